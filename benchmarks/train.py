"""Our training step side by side with TRL's DPOTrainer and a plain torch SFT step: same weights, same sequences, one core.

Each side is a process that is pinned to the same core and runs one thread (pinned.py, train_sides.py); only one works
at a time. After a warm-up of its own (compiling) every round runs all sides once, beginning with another each time;
medians count. An update is: collating, forward, backward, clipping, AdamW on all parameters. All sides see the same
sequences, whose tokens are counted the same for all (a prompt that ours computes once counts twice), and their losses
are compared.

    dpo_vs_RIVAL         4 pairs of 64 + 192 tokens, the reference's log-probs given
    dpo_live_vs_RIVAL    the same, the reference computed in the update
    dpo_real_vs_RIVAL    pairs of packaged ranked replies, lengths as people wrote them
    sft_judge_vs_RIVAL   judge examples of about 530 tokens, loss on the last 60
    memory_vs_RIVAL      peak memory of the process in a `dpo` update, ours over theirs (weights, moments and all)
    linear               ours alone: 2, 4 and 8 such pairs an update, the most seconds a token over the fewest

The first four are the rival's seconds over ours of the same precision. Rivals that are not installed are left out.
GLIBC_TUNABLES is glibc.malloc.hugetlb=1 for all sides, as launch/local.sh sets it, unless it is set.

    python -m benchmarks.train --out benchmarks/results/train.json
"""

import argparse
import contextlib
import dataclasses
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import generate_work, pinned, rounds
from benchmarks.figures import hand_over, problems
from selfreward_jax.cli import exit_code
from selfreward_jax.convert import convert
from selfreward_jax.data import oasst
from selfreward_jax.data.chat import Chat, encode_example, encode_text, load_chat
from selfreward_jax.data.seeds import packaged
from selfreward_jax.errors import UserError
from selfreward_jax.observe.progress import say
from selfreward_jax.weights.source import open_source

# side: (kind of `train_sides.OPEN`, dtype, what must be installed)
SIDES = {
    "ours_fp32": ("ours", "float32", "jax"), "ours_bf16": ("ours", "bfloat16", "jax"),
    "trl_fp32": ("trl", "float32", "trl"), "trl_bf16": ("trl", "bfloat16", "trl"),
    "torch_fp32": ("torch", "float32", "torch"), "torch_bf16": ("torch", "bfloat16", "torch"),
}  # fmt: skip
PRECISIONS = ("fp32", "bf16")
# workload: whose side is compared ("": nobody's), and in which precisions
WORKLOADS = {
    "dpo": ("trl", PRECISIONS), "dpo_real": ("trl", PRECISIONS), "sft_judge": ("torch", PRECISIONS),
    "dpo_live": ("trl", ("fp32",)), "linear": ("", ("fp32",)),
}  # fmt: skip
PROMPT, RESPONSE, PAIRS = 64, 192, 4
GROWING = (2, 4, 8)  # pairs of `linear`
JUDGED, TARGETS = 8, 60
LOSS = {"fp32": 2e-3, "bf16": 5e-2}  # that the sides' first losses may be apart, relative

Sequences = list[tuple[list[int], int]]


@dataclasses.dataclass(frozen=True)
class Work:
    """An update: the order of `train_sides` and its tokens."""

    order: dict[str, Any]
    tokens: int


def fixed_pairs(chat: Chat, count: int = PAIRS) -> Sequences:
    """Pairs of exact lengths, cut out of packaged replies."""
    replies = [reply for ranked in oasst.load(packaged("trees.jsonl")).sets for reply in ranked.replies]
    stream = [token for reply in replies for token in encode_text(chat, reply)]
    each = PROMPT + 2 * RESPONSE
    if len(stream) < count * each:
        raise UserError(f"the packaged replies have {len(stream)} tokens, {count * each} are needed")
    found: Sequences = []
    for place in range(0, count * each, each):
        prompt = stream[place : place + PROMPT]
        middle = place + PROMPT + RESPONSE
        found += [(prompt + stream[place + PROMPT : middle], PROMPT), (prompt + stream[middle : place + each], PROMPT)]
    return found


def real_pairs(chat: Chat, count: int) -> Sequences:
    """The best and the worst reply of the first packaged ranked sets, with the end of turn."""
    found: Sequences = []
    for ranked in [one for one in oasst.load(packaged("trees.jsonl")).sets if len(one.replies) > 1][:count]:
        found += [encode_example(chat, ranked.prompt, reply) for reply in (ranked.replies[0], ranked.replies[-1])]
    if len(found) < 2 * count:
        raise UserError(f"--real={count}: the packaged file has {len(found) // 2} ranked sets with two replies")
    return found


def judge_examples(chat: Chat) -> Sequences:
    """Judge prompts near 530 tokens, whose last tokens are the targets: what is learnt does not matter for its time."""
    prompts = generate_work.judging(chat, JUDGED, 1).prompts
    return [(list(ids), len(ids) - TARGETS) for ids in prompts]


def tokens_of(sequences: Sequences) -> int:
    return sum(len(ids) for ids, _ in sequences)


@contextlib.contextmanager
def taking(
    name: str, precision: str, arguments: argparse.Namespace, folder: Path, about: dict[str, Any]
) -> Iterator[list[pinned.Side]]:
    """The sides of a workload, each with the weights as they were at the start; what they say of themselves is added to `about`."""
    sides: list[pinned.Side] = []
    try:
        for side in arguments.sides:
            kind, dtype, package = SIDES[side]
            if kind in ("ours", WORKLOADS[name][0]) and side.endswith(precision) and pinned.installed(side, package):
                order = [kind, str(folder / "model"), dtype]
                sides.append(pinned.start(side, "benchmarks.train_sides", order, arguments.core, folder))
                about[side] = sides[-1].about
                say(f"[{name}] {side}: ready after {about[side]['load_seconds']} s")
        yield sides
    finally:
        for side in sides:
            pinned.stop(side)


def measure(arguments: argparse.Namespace, folder: Path, chat: Chat, about: dict[str, Any]) -> dict[str, Any]:
    """All figures: the keys first, then what they come from."""
    keys: dict[str, float] = {}
    found: dict[str, dict[str, Any]] = {}
    for precision in PRECISIONS:  # one after the other: all sides together would need 30 GB
        for name in arguments.only:
            ours = f"ours_{precision}"
            if precision not in WORKLOADS[name][1] or ours not in arguments.sides:
                continue
            with taking(name, precision, arguments, folder, about) as sides:
                first = next(side for side in sides if side.name == ours)
                if name == "linear":
                    grown = linear(first, chat, arguments.rounds)
                    rates = [one[ours]["tokens_per_second"] for one in grown.values()]
                    keys[name], found = round(max(rates) / min(rates), 3), found | grown
                    continue
                one = workload(name, sides, work_of(name, first, chat, arguments.real), arguments.rounds)
            found.setdefault(name, {}).update(one)
            for rival in one.keys() - {ours}:
                keys[f"{name}_vs_{rival}"] = round(one[rival]["seconds"] / one[ours]["seconds"], 3)
                if name == "dpo":
                    keys[f"memory_vs_{rival}"] = round(one[ours]["peak_mb"] / one[rival]["peak_mb"], 3)
    return keys | {"workloads": found}


def work_of(name: str, ours: pinned.Side, chat: Chat, real: int) -> Work:
    """The update of a workload with rivals; where the reference is given, our side computes it."""
    if name == "sft_judge":
        sequences, task = judge_examples(chat), "sft"
    elif name == "dpo_real":
        sequences, task = real_pairs(chat, real), "dpo"
    else:
        sequences, task = fixed_pairs(chat), name
    order: dict[str, Any] = {"task": task, "sequences": sequences}
    if task == "dpo":
        logps = pinned.ask(ours, task="logps", sequences=sequences)["logps"]
        # Not the policy's own, so that losses say something: margins of 0.1 x 6 and 0.1 x -6 in turn.
        order["reference"] = [one + (3 if place % 4 in (0, 3) else -3) for place, one in enumerate(logps)]
    return Work(order, tokens_of(sequences))


def linear(ours: pinned.Side, chat: Chat, count: int) -> dict[str, Any]:
    """Updates of ever more pairs, each a workload."""
    grown = {}
    for pairs in GROWING:
        sequences, name = fixed_pairs(chat, pairs), f"linear_{pairs}"
        grown[name] = workload(name, [ours], Work({"task": "dpo", "sequences": sequences}, tokens_of(sequences)), count)
    return grown


def workload(name: str, sides: list[pinned.Side], work: Work, count: int) -> dict[str, Any]:
    """The rounds of one workload, each side's figures, and its losses compared."""
    warm, replies = {}, {side.name: [] for side in sides}
    for side in sides:
        say(f"[{name}] warming up {side.name}")
        reply, warm[side.name] = rounds.timed(lambda side=side: pinned.ask(side, **work.order))
        replies[side.name].append(reply)
    losses = {side.name: replies[side.name][0]["loss"] for side in sides}
    for side in sides:
        precision = side.name.split("_")[1]
        expected = losses.get(f"ours_{precision}", losses[side.name])
        if abs(losses[side.name] - expected) > LOSS[precision] * abs(expected):
            raise UserError(f"[{name}] {side.name}: a loss of {losses[side.name]:.5f}, ours {expected:.5f}: not the same update")

    def once(side: pinned.Side) -> list[rounds.Run]:
        reply = pinned.ask(side, **work.order)
        if reply.get("compiled"):
            raise UserError(f"[{name}] {side.name}: {reply['compiled']} programs were compiled in a timed update: a bug here")
        replies[side.name].append(reply)
        return [rounds.Run(reply["seconds"], work.tokens, 1, 0, reply["core_share"], reply["threads"])]

    runs = rounds.interleaved(name, sides, once, count)
    out = {}
    for side in sides:
        taken = [run.seconds for (run,) in runs[side.name]]
        last = replies[side.name][-1]
        out[side.name] = {
            "seconds": round(statistics.median(taken), 3), "spread": [round(min(taken), 3), round(max(taken), 3)],
            "tokens": work.tokens, "tokens_per_second": round(work.tokens / statistics.median(taken), 1),
            "loss": round(losses[side.name], 6), "positions": last["positions"],
            "peak_mb": round(max(reply["peak_mb"] for reply in replies[side.name][1:]), 1),
            "core_share": round(min(run.core_share for (run,) in runs[side.name]), 3),
            "warm_up_seconds": warm[side.name],
        } | ({"wasted": round(last["wasted"], 4)} if "wasted" in last else {})  # fmt: skip
        one = out[side.name]
        say(
            f"{name:>10} {side.name:>10} {one['seconds']:>8.2f} s {one['spread']} {one['tokens_per_second']:>7.1f} tokens/s,"
            f" {one['positions']} positions, loss {one['loss']:.4f}, peak {one['peak_mb']:.0f} MB"
        )
        pinned.warn_if_shared(side.name, name, one["core_share"])
    return out


def run(arguments: argparse.Namespace) -> None:
    """The whole benchmark."""
    wrong = problems(arguments, ("rounds", "real"), {"only": tuple(WORKLOADS), "sides": tuple(SIDES)})
    taken = [p for name in arguments.only for p in WORKLOADS.get(name, ("", ()))[1] if f"ours_{p}" in arguments.sides]
    if not taken:
        wrong.append("--sides, --only: nothing of ours is left to measure")
    if wrong:
        raise UserError(*wrong)
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    about: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="train_", dir=arguments.dir) as scratch:
        folder = Path(scratch)
        say(convert(arguments.model, str(folder / "model"), "float32"))
        source = open_source(str(folder / "model"))
        chat = load_chat(source.tokenizer, "own", source.eos_ids)
        figures = measure(arguments, folder, chat, about)
    figures |= {
        "settings": {name: getattr(arguments, name) for name in ("model", "rounds", "real", "core")}
        | {"GLIBC_TUNABLES": os.environ["GLIBC_TUNABLES"]},
        "sides": about, "cpu": pinned.cpu_name(),
        "python": platform.python_version(),
    }  # fmt: skip
    hand_over(figures, arguments.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", default="demo", help="as convert's --source (default %(default)s: SmolLM2-135M-Instruct)")
    option("--only", default=",".join(WORKLOADS), help="workloads (default %(default)s)")
    option("--sides", default=",".join(SIDES), help="who takes part (default %(default)s)")
    option("--rounds", type=int, default=3, help="timed updates of each side (default %(default)s)")
    option("--real", type=int, default=8, help="pairs of dpo_real (default %(default)s)")
    option("--core", type=int, default=pinned.last_core(), help="that all sides run on (default %(default)s)")
    option("--dir", default=None, help="where the model's files lie meanwhile; then removed")
    option("--out", default="", help="a file for the last line too")
    return exit_code(lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
