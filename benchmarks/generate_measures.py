"""The workloads of benchmarks/generate.py as they are measured: warm-up, rounds, and each side's figures."""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import generate_work, gguf_file, pinned, rounds
from benchmarks.generate_work import Work
from selfreward_jax.data.chat import Chat
from selfreward_jax.errors import UserError
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.observe.progress import say

# side: (kind of `generate_sides.OPEN`, dtype, what must be installed)
SIDES = {
    "ours_fp32": ("ours", "float32", "jax"),
    "ours_bf16": ("ours", "bfloat16", "jax"),
    "hf_fp32": ("hf", "float32", "torch"),
    "hf_bf16": ("hf", "bfloat16", "torch"),
    **{f"llamacpp_{kind}": ("llamacpp", kind, "llama_cpp") for kind in gguf_file.KINDS},
}
OURS = ("ours_fp32", "ours_bf16")
# Ours with which each rival is compared: that of its own precision. q8_0 reads fewer bytes than either.
OF_RIVAL = {name: OURS[0 if name.endswith("32") else 1] for name in SIDES if name not in OURS}
WORKLOADS = {
    "candidates": tuple(SIDES), "judging": (*OURS, "hf_fp32", "hf_bf16"), "sampling_half": ("ours_bf16", "hf_bf16"),
    "roof": ("ours_fp32",),
}  # fmt: skip
GREEDY_TOKENS = 16
GREEDY_EQUAL = 0.5  # what a float32 rival's greedy completions must at least have in common with ours
ROOF_PROMPTS = 32  # 128 completions


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all workloads share; `choices` are by (side, workload), and grow."""

    arguments: argparse.Namespace
    chat: Chat
    config: LlamaConfig
    sides: dict[str, pinned.Side]
    choices: dict[tuple[str, str], tuple[rounds.Choice, dict[str, float]]]
    kept: rounds.Kept = rounds.NOTHING

    def taking_part(self, workload: str) -> list[pinned.Side]:
        """The sides of a workload that are there, ours first."""
        return [self.sides[name] for name in WORKLOADS[workload] if name in self.sides]


def choice(bench: Bench, side: pinned.Side, work: Work) -> rounds.Choice:
    """The side's fastest way to do such work; looked for the first time, which warms the side up."""
    key = (side.name, work.name)
    if key not in bench.choices:
        kind = SIDES[side.name][0]
        if kind == "ours":
            found = {"rows": bench.arguments.rows}, {}
        elif kind == "hf":
            found = rounds.faster_batch(side, work, bench.arguments.hf_batches)
        else:
            found = rounds.faster_cache(side, work)
        bench.choices[key] = found
    return bench.choices[key][0]


def fixed_lengths(bench: Bench, name: str, work: Work) -> dict[str, Any]:
    """A workload whose completions are all of one length: tokens are the same for all sides."""
    sides, warm_up = bench.taking_part(name), {}
    for side in sides:
        say(f"[{name}] warming up {side.name}")
        used, seconds = rounds.timed(lambda side=side: choice(bench, side, work))
        if side.name in OURS:  # compiles
            seconds = rounds.timed(lambda side=side, used=used: rounds.sample(side, work, used))[1]
        warm_up[side.name] = seconds
    once = lambda side: [rounds.sample(side, work, choice(bench, side, work))[0]]  # noqa: E731
    found = rounds.interleaved(name, sides, once, bench.arguments.rounds, bench.kept)
    tokens = {run.tokens for runs in found.values() for one in runs for run in one}
    if tokens != {work.completions * work.tokens}:
        raise UserError(f"{name}: the sides made {sorted(tokens)} tokens, all should make as many")
    return {side.name: rounds.figures([rounds.total(one) for one in found[side.name]])
            | {"warm_up_seconds": warm_up[side.name]} | _chosen(bench, side, work) for side in sides}  # fmt: skip


def sampling_half(bench: Bench) -> dict[str, Any]:
    """Answers to real prompts, and judgments of what each side answered; its stages are in the figures too."""
    arguments, chat = bench.arguments, bench.chat
    judged = generate_work.judging(chat, min(arguments.judged, 32), arguments.judgment_tokens)
    template = max(map(len, generate_work.judge_prompts(chat, [("", "")])))
    room = bench.config.context - template - 2 * arguments.c_tokens - arguments.judgment_tokens
    asked = generate_work.questions(arguments.oasst, arguments.c_prompts, chat, room)
    work = generate_work.answering(chat, asked, arguments.c_tokens)

    def once(side: pinned.Side) -> list[rounds.Run]:
        answering, answers = rounds.sample(side, work, choice(bench, side, work))
        # Judge prompts depend on the answers: how they are judged fastest was found with packaged ones.
        second = generate_work.judging_of(chat, asked, answers, arguments.judgment_tokens, bench.config.context)
        return [answering, rounds.sample(side, second, choice(bench, side, judged))[0]]

    sides, warm_up = bench.taking_part("sampling_half"), {}
    for side in sides:
        say(f"[sampling_half] warming up {side.name}")
        found = [rounds.timed(lambda side=side, kind=kind: choice(bench, side, kind))[1] for kind in (work, judged)]
        warm_up[side.name] = rounds.timed(lambda side=side: once(side))[1] if side.name in OURS else sum(found)
    runs = rounds.interleaved("sampling_half", sides, once, arguments.rounds, bench.kept)
    out = {}
    for side in sides:
        stages = {name: rounds.figures([one[place] for one in runs[side.name]])
                  for place, name in enumerate(("answers", "judgments"))}  # fmt: skip
        stages["answers"] |= _chosen(bench, side, work)
        stages["judgments"] |= _chosen(bench, side, judged)
        out[side.name] = rounds.figures([rounds.total(one) for one in runs[side.name]])
        out[side.name] |= {"warm_up_seconds": warm_up[side.name], "stages": stages}
    return out


def _chosen(bench: Bench, side: pinned.Side, work: Work) -> dict[str, Any]:
    """How the side was called, and what its trials said: seconds a prompt by batch size, seconds a run by cache."""
    used, tried = bench.choices[side.name, work.name]
    return {"choice": dict(used)} | ({"tried_seconds": tried} if tried else {})


def roof(bench: Bench) -> dict[str, Any]:
    """How much of the matrix product's own rate decoding reaches with 128 completions at once."""
    side, arguments = bench.sides["ours_fp32"], bench.arguments
    work = generate_work.candidates(bench.chat, ROOF_PROMPTS, arguments.tokens)
    short, rows = max(1, arguments.tokens // 4), {"rows": work.completions}
    say("[roof] warming up ours")
    warm_up = [rounds.timed(lambda tokens=tokens: rounds.sample(side, work, rows, tokens=tokens))[1]
               for tokens in (arguments.tokens, short)]  # fmt: skip
    gemm: list[float] = []
    decoding: list[float] = []

    def once(side: pinned.Side) -> list[rounds.Run]:
        gemm.append(pinned.ask(side, gemm=True)["gflops"])
        long, brief = (rounds.sample(side, work, rows, tokens=tokens)[0] for tokens in (arguments.tokens, short))
        if long.seconds <= brief.seconds:
            raise UserError(f"roof: {arguments.tokens} tokens take no longer than {short}; raise --tokens")
        decoding.append((long.tokens - brief.tokens) / (long.seconds - brief.seconds))
        return [long]

    runs = rounds.interleaved("roof", [side], once, arguments.rounds)[side.name]
    rate, best, flop = statistics.median(decoding), max(gemm), operations(bench.config)
    return {
        side.name: rounds.figures([rounds.total(one) for one in runs]) | {"warm_up_seconds": sum(warm_up)},
        "decoding_tokens_per_second": round(rate, 2), "decoding_spread": [round(f(decoding), 2) for f in (min, max)],
        "gemm_gflops": round(best, 1), "gflop_per_token": round(flop / 1e9, 4),
        "share": round(rate * flop / 1e9 / best, 4),
    }  # fmt: skip


def operations(config: LlamaConfig) -> int:
    """Floating-point operations of a token: 2 a parameter of the layers and of the head, which may be the embedding."""
    lookup = 0 if config.tied else config.vocab_size * config.embed
    return 2 * (config.parameter_count() - lookup)


def greedy_agreement(bench: Bench) -> dict[str, float]:
    """The share of greedy tokens that each other side has in common with ours in float32 (if that takes no part: in
    bfloat16), up to each prompt's first difference.

    Raises:
        UserError: if a float32 rival has few: its weights are others.
    """
    work = generate_work.candidates(bench.chat, bench.arguments.prompts, GREEDY_TOKENS)
    work = dataclasses.replace(work, name="greedy", samples=1)
    all_at_once = {
        "ours": {"rows": work.completions},
        "hf": {"batch": work.completions},
        "llamacpp": {"unified": True},
    }
    found = {}
    for name, side in bench.sides.items():
        say(f"[greedy] {name}")
        found[name] = rounds.sample(side, work, all_at_once[SIDES[name][0]], rounds.GREEDY)[1]
    first = next(name for name in OURS if name in found)
    ours = [ids for some in found.pop(first) for ids in some]
    shares = {}
    for name, completions in found.items():
        rows = [ids for some in completions for ids in some]
        equal = sum(_common(*pair) for pair in zip(ours, rows, strict=True))
        shares[name] = round(equal / (len(ours) * GREEDY_TOKENS), 4)
        if shares[name] < GREEDY_EQUAL and name in ("hf_fp32", "llamacpp_f32"):
            raise UserError(f"{name}: {shares[name]:.0%} of its greedy tokens are ours: not the same model")
    return shares


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return next((place for place, pair in enumerate(zip(first, second)) if pair[0] != pair[1]), len(first))


def ratios(workload: str, figures: dict[str, Any]) -> dict[str, float]:
    """The keys of a workload, by medians: ours over each rival of the same precision."""
    out = {}
    for name, ours in ((name, figures.get(own)) for name, own in OF_RIVAL.items() if name in figures):
        if not ours:
            continue
        out[f"{workload}_vs_{name}"] = round(ours["tokens_per_second"] / figures[name]["tokens_per_second"], 3)
        if workload == "sampling_half":
            share = ours["completions_per_second"] / figures[name]["completions_per_second"]
            out[f"{workload}_per_completion_vs_{name}"] = round(share, 3)
    return out
