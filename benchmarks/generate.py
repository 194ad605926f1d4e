"""Our sampling engine side by side with Hugging Face `generate` and llama.cpp: same weights, same prompts, one core.

Each side is a process that is pinned to the same core and runs one thread (pinned.py, generate_sides.py); only one
works at a time. After a warm-up of its own (compiling; and each rival's fastest way to be called is looked for) every
round runs all sides once, beginning with another each time; medians count. All sides sample at temperature 0.7 and
top-p 0.9 over the whole vocabulary; time runs from token ids to token ids. Greedy completions are compared beforehand.

    candidates_vs_RIVAL        tokens/s of ours over the rival's: 8 prompts, 4 completions of exactly 128 tokens each; ours
                               computes in the precision of the rival (in bfloat16 against q8_0)
    judging_vs_RIVAL           the same for 32 judge prompts of about 530 tokens, 3 judgments of exactly 100 tokens each
    sampling_half_vs_hf_bf16   the same for 64 first turns of an OASST file (`--oasst`): 4 answers of at most 256 tokens,
                               then 3 judgments of each answer; they end when they end, so differ from side to side
    sampling_half_per_completion_vs_hf_bf16    completions/s instead
    roof_share                 of float32: ours with 128 completions at once, decoding alone (a long run's time less a
                               short one's), times 2 operations for each parameter that a token meets, over the best
                               rate of XLA's own matrix product on this core in this run

Beside them stand each side's median and spread, its seconds of warm-up (ours: compiling and one run), its dtype, how it
was called, and the share of the core that it got: below 1, other work ran there, and the figures are worth little.

Rivals that are not installed are left out. Needs 2 GB of disk, and 16 GB of memory for all sides together.

    python -m benchmarks.generate --oasst=en_100_tree.jsonl --out benchmarks/results/generate.json
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from benchmarks import generate_measures as measures
from benchmarks import generate_work, gguf_file, pinned, rounds
from benchmarks.figures import hand_over, problems
from benchmarks.generate_measures import OF_RIVAL, OURS, SIDES, WORKLOADS, Bench
from selfreward_jax.cli import exit_code
from selfreward_jax.convert import convert
from selfreward_jax.data.chat import load_chat
from selfreward_jax.errors import UserError
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.observe.progress import say
from selfreward_jax.weights.source import open_source

COUNTS = ("rounds", "prompts", "tokens", "judged", "judgment_tokens", "c_prompts", "c_tokens", "rows")


def check(arguments: argparse.Namespace) -> None:
    """Reads the lists among the options, and leaves out what is not there.

    Raises:
        UserError: for each option that makes no sense.
    """
    wrong = problems(arguments, COUNTS, {"only": tuple(WORKLOADS), "rivals": tuple(OF_RIVAL)})
    sizes = arguments.hf_batches.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        wrong.append(f"--hf_batches={arguments.hf_batches}: whole numbers above 0 with commas between them")
    if "sampling_half" in arguments.only and not arguments.oasst:
        say("sampling_half is left out: it needs --oasst=FILE")
        arguments.only.remove("sampling_half")
    if not arguments.only:
        wrong.append("--only: nothing is left to measure")
    if wrong:
        raise UserError(*wrong)
    arguments.hf_batches = [int(size) for size in sizes]


def there(arguments: argparse.Namespace, config: LlamaConfig) -> list[str]:
    """The sides that take part in what is measured and can run here; a line for each rival that cannot."""
    asked = {name for workload in arguments.only for name in WORKLOADS[workload]}
    rivals = [name for name in arguments.rivals if name in asked]
    compared = {OF_RIVAL[name] for name in rivals} or set(OURS)
    if "roof" in arguments.only:
        compared.update(WORKLOADS["roof"])
    found = []
    for name in (*(name for name in OURS if name in compared & asked), *rivals):
        kind, dtype, needed = SIDES[name]
        if not pinned.installed(name, needed):
            continue
        if kind == "llamacpp" and (why := gguf_file.refusal(config, dtype)):
            say(f"{name} is left out: {why}")
        else:
            found.append(name)
    return found


def start(arguments: argparse.Namespace, names: list[str], folder: Path, sides: dict[str, pinned.Side]) -> Bench:
    """Writes the files that the sides need and starts them one after the other, into `sides`."""
    source = open_source(str(folder / "model"))
    for name in names:
        kind, dtype, _ = SIDES[name]
        file = folder / "model"
        if kind == "llamacpp":
            file = folder / f"{dtype}.gguf"
            gguf_file.write(folder / "model", source.config, dtype, file)
        sides[name] = pinned.start(
            name, "benchmarks.generate_sides", [kind, str(file), dtype], arguments.core, folder
        )
        say(f"{name}: ready after {sides[name].about['load_seconds']} s")
    chat = load_chat(source.tokenizer, "own", source.eos_ids)
    kept = rounds.kept_in(Path(arguments.kept), settings(arguments)) if arguments.kept else rounds.NOTHING
    return Bench(arguments, chat, source.config, sides, {}, kept)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, for people and for rounds that are kept."""
    asked = {name: getattr(arguments, name) for name in (*COUNTS, "model", "core")}
    return asked | {"oasst": epath.Path(arguments.oasst).name}


def measure(bench: Bench) -> dict[str, Any]:
    """All figures: the keys first, then what they come from."""
    arguments = bench.arguments
    greedy = measures.greedy_agreement(bench)
    say(f"greedy tokens in common with ours: {greedy or 'no rivals'}")
    found: dict[str, dict[str, Any]] = {}
    keys: dict[str, float] = {}
    for workload in arguments.only:
        if workload == "roof":
            figures = measures.roof(bench)
            keys["roof_share"] = figures["share"]
        elif workload == "sampling_half":
            figures = measures.sampling_half(bench)
        else:
            work = generate_work.candidates(bench.chat, arguments.prompts, arguments.tokens)
            if workload == "judging":
                work = generate_work.judging(bench.chat, arguments.judged, arguments.judgment_tokens)
            figures = measures.fixed_lengths(bench, workload, work)
        keys |= measures.ratios(workload, figures)
        found[workload] = figures
        show(workload, figures)
        say(json.dumps({workload: figures}))  # hours of work: a side that fails later does not take it along
    return keys | {"workloads": found, "greedy_in_common": greedy}


def show(workload: str, figures: dict[str, Any]) -> None:
    """Prints a workload's figures, and says which sides did not have the core for themselves."""
    for name, one in figures.items():
        if not isinstance(one, dict):
            continue
        say(
            f"{workload:>14} {name:>14} {one['tokens_per_second']:>8.1f} tokens/s {one['spread']}"
            f" {one['completions_per_second']:>8.3f} completions/s, {one['ended_share']:.0%} ended by end of turn,"
            f" warm-up {one['warm_up_seconds']:.1f} s"
        )
        for stage, part in one.get("stages", {}).items():
            mean = sum(part["tokens"]) / len(part["tokens"]) / part["completions"]
            say(f"{stage:>29}: {part['ended_share']:.1%} ended by end of turn, {mean:.1f} tokens each")
        pinned.warn_if_shared(name, workload, one["core_share"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", default="demo", help="as convert's --source (default %(default)s: SmolLM2-135M-Instruct)")
    option("--only", default=",".join(WORKLOADS), help="workloads (default %(default)s)")
    option("--rivals", default=",".join(OF_RIVAL), help="who else takes part (default %(default)s)")
    option("--rounds", type=int, default=3, help="timed runs of each side (default %(default)s)")
    option("--prompts", type=int, default=8, help="of candidates (default %(default)s)")
    option("--tokens", type=int, default=128, help="of each candidate, and for the roof (default %(default)s)")
    option("--judged", type=int, default=32, help="judge prompts (default %(default)s)")
    option("--judgment_tokens", type=int, default=100, help="of each judgment (default %(default)s)")
    option("--oasst", default="", help="OASST file of the sampling half; without it that is left out")
    option("--c_prompts", type=int, default=64, help="prompts of the sampling half (default %(default)s)")
    option("--c_tokens", type=int, default=256, help="of its answers at most (default %(default)s)")
    option("--rows", type=int, default=96, help="completions that ours decodes together (default %(default)s)")
    option("--hf_batches", default="4,8,16,32", help="prompts at a time that are tried (default %(default)s)")
    option("--core", type=int, default=pinned.last_core(), help="that all sides run on (default %(default)s)")
    option("--kept", default="", help="a file for rounds as they end; one that is there goes on (all but the roof's)")
    option("--dir", default=None, help="where the models' files lie meanwhile; then removed")
    option("--out", default="", help="a file for the last line too")
    return exit_code(lambda: run(parser.parse_args()))


def run(arguments: argparse.Namespace) -> None:
    """The whole benchmark."""
    check(arguments)
    jax.config.update("jax_platforms", "cpu")
    sides: dict[str, pinned.Side] = {}
    with tempfile.TemporaryDirectory(prefix="generate_", dir=arguments.dir) as scratch:
        folder = Path(scratch)
        say(convert(arguments.model, str(folder / "model"), "float32"))
        try:
            names = there(arguments, open_source(str(folder / "model")).config)
            figures = measure(start(arguments, names, folder, sides))
        finally:
            for side in sides.values():
                pinned.stop(side)
    figures |= {"settings": settings(arguments),
                "sides": {name: side.about for name, side in sides.items()},
                "cpu": pinned.cpu_name(), "python": platform.python_version()}  # fmt: skip
    hand_over(figures, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
