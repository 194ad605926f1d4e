"""Which values of a config make no sense, alone or together; `config.from_config_dict` reports all at once."""

from __future__ import annotations

import math
import operator
import re
from typing import Any

from selfreward_jax import stores

# Fields whose values may be paths; `judge.model` may be an URL too.
_PATHS = (
    "model.source", "model.tokenizer", "model.chat_template", "data.oasst", "data.ift", "data.preferences",
    "data.validation", "eft.file", "prompts.source", "prompts.model", "prompts.avoid", "judge.template", "engine.cache",
)  # fmt: skip


def fewest_examples(c: Any) -> tuple[int, str]:
    """IFT examples that the target cannot do without, and what for."""
    shots = c.prompts.seed_demonstrations + c.prompts.generated_demonstrations
    if shots > 1 and c.prompts.source == "self_instruct" and c.target not in ("sft", "m1"):
        return shots, "prompts.seed_demonstrations and prompts.generated_demonstrations, while the pool is empty"
    return 1, "to train on"


def sampling(how: Any) -> list[str]:
    """A line for each sampling option out of its range: of a group of the config, of a command or of a `Sampling`."""
    holds = {
        f"temperature={how.temperature}: a number that is not negative": 0 <= how.temperature < math.inf,
        f"top_k={how.top_k}: not negative; 0 is no limit": how.top_k >= 0,
        f"top_p={how.top_p}: in (0, 1]": 0 < how.top_p <= 1,
        f"min_p={how.min_p}: in [0, 1); 0 is no limit": 0 <= how.min_p < 1,
        f"max_new_tokens={how.max_new_tokens}: at least 1": how.max_new_tokens >= 1,
    }
    return [line for line, held in holds.items() if not held]


def find(c: Any) -> list[str]:
    """A line for each value out of its range and each pair of values that contradict each other; `c` is a `config.Config`."""
    found = []

    def need(holds: bool, line: str) -> None:
        if not holds:
            found.append(f"--config.{line}")

    need(bool(re.fullmatch(r"sft|m[1-9][0-9]*", c.target)), f"target={c.target}: sft, m1, m2, ...")
    for name in _PATHS:
        value = operator.attrgetter(name)(c)
        for path in value if isinstance(value, tuple) else (value,):
            reason = stores.refusal(path)
            need(not reason, f"{name}={path}: {reason}")
    need(0 <= c.seed < 2**32, f"seed={c.seed}: from 0 to 2**32 - 1")
    for name, value in (
        ("param_dtype", c.model.param_dtype),
        ("compute_dtype", c.model.compute_dtype),
        ("export_dtype", c.model.export_dtype),
    ):
        need(value in ("float32", "bfloat16"), f"model.{name}={value}: float32 or bfloat16")
    for name, mesh in (("mesh", c.mesh), ("generation_mesh", c.generation_mesh)):
        sizes = (mesh.data, mesh.fsdp, mesh.tensor)
        need(
            not any(sizes) or (all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1),
            f"{name}={sizes}: name data, fsdp and tensor (one may be -1: what is left), or leave all three at 0",
        )
    need(
        c.model.attention in ("auto", "plain", "mapped", "cudnn", "splash"),
        f"model.attention={c.model.attention}: auto, plain, mapped, cudnn or splash",
    )
    need(c.model.remat in ("none", "dots", "full"), f"model.remat={c.model.remat}: none, dots or full")
    need(c.model.unroll >= 1 and c.model.decode_unroll >= 1, "model.unroll, model.decode_unroll: at least 1")
    for name, part in (("sft", c.sft), ("dpo", c.dpo)):
        need(
            part.lr > 0 and 0 <= part.lr_end <= part.lr,
            f"{name}.lr_end={part.lr_end}: between 0 and {name}.lr={part.lr}",
        )
        need(part.batch >= 1 and part.row >= 1, f"{name}.batch, {name}.row: at least 1")
        need(part.optimizer in ("adamw", "adafactor"), f"{name}.optimizer={part.optimizer}: adamw or adafactor")
        need(part.moments in ("float32", "bfloat16"), f"{name}.moments={part.moments}: float32 or bfloat16")
        need(part.on_bad in ("stop", "skip"), f"{name}.on_bad={part.on_bad}: stop or skip")
        need(part.spike == 0 or part.spike > 1, f"{name}.spike={part.spike}: above 1, or 0")
        need(part.epochs >= 1, f"{name}.epochs={part.epochs}: at least 1")
        need(0 <= part.dropout < 1, f"{name}.dropout={part.dropout}: in [0, 1)")
        need(part.keep >= 1, f"{name}.keep={part.keep}: at least 1")
        need(
            part.warmup >= 0 and part.clip >= 0 and part.weight_decay >= 0 and part.checkpoint_every >= 0,
            f"{name}: warmup, clip, weight_decay and checkpoint_every are not negative",
        )
        need(0 <= part.b1 < 1 and 0 <= part.b2 < 1 and part.eps > 0, f"{name}: b1 and b2 in [0, 1), eps above 0")
    need(c.dpo.beta > 0, f"dpo.beta={c.dpo.beta}: above 0")
    need(c.dpo.reference in ("cached", "live"), f"dpo.reference={c.dpo.reference}: cached or live")
    need(c.eft.source in ("build", "file", "none"), f"eft.source={c.eft.source}: build, file or none")
    need(
        c.eft.source != "file" or bool(c.eft.file),
        "eft.source=file: name judge examples by --config.eft.file=FILE, or =seed for the packaged ones",
    )
    for name, value in (("train_sets", c.eft.train_sets), ("eval_sets", c.eft.eval_sets)):
        need(value >= -1, f"eft.{name}={value}: at least 0, or -1 for all that are left")
    need(
        c.eft.source != "build" or c.eft.train_sets != 0,
        "eft.train_sets=0: eft.source=build judges ranked sets; -1 takes all that are left",
    )
    need(
        c.eft.source != "build" or c.eft.eval_sets != -1,
        "eft.eval_sets=-1: takes all ranked sets, so eft.source=build is left without; give a number",
    )
    # Sets for building are set aside without judge data too (stages/seed.py); of data.ift none asks a set's question.
    shared = c.eft.source in ("build", "none") and c.data.oasst != "none" and not c.data.ift
    need(
        not (shared and c.data.ift_examples == c.eft.train_sets == -1),
        "data.ift_examples=-1: takes all that eft.train_sets=-1 leaves, which takes all that IFT leaves; give one a number",
    )
    fewest, purpose = fewest_examples(c)
    need(
        c.data.ift_examples == -1 or c.data.ift_examples >= fewest,
        f"data.ift_examples={c.data.ift_examples}: at least {fewest} ({purpose}), or -1 for all",
    )
    need(c.eft.ties in ("strict", "lenient"), f"eft.ties={c.eft.ties}: strict or lenient")
    need(c.data.oasst != "none" or bool(c.data.ift), "data.oasst=none: name instruction rows by --config.data.ift")
    need(
        c.data.oasst != "none" or (c.eft.source != "build" and c.eft.eval_sets <= 0),
        "data.oasst=none: without ranked replies, set --config.eft.source=file or none and --config.eft.eval_sets=0",
    )
    need(c.eft.k >= 1, f"eft.k={c.eft.k}: at least 1")
    need(0 < c.eft.max_share <= 1, f"eft.max_share={c.eft.max_share}: in (0, 1]")
    need(c.prompts.top_up in ("none", "seed"), f"prompts.top_up={c.prompts.top_up}: none or seed")
    need(c.prompts.normalise in ("chat", "faithful"), f"prompts.normalise={c.prompts.normalise}: chat or faithful")
    shots = (c.prompts.seed_demonstrations, c.prompts.generated_demonstrations)
    need(
        min(shots) >= 0 and sum(shots) >= 1,
        f"prompts.seed_demonstrations={shots[0]}, prompts.generated_demonstrations={shots[1]}: not negative, and"
        " together at least 1",
    )
    need(0 < c.prompts.similarity <= 1, f"prompts.similarity={c.prompts.similarity}: in (0, 1]")
    need(c.prompts.requests >= 1, "prompts.requests: at least 1")
    for name, values in (
        ("num_prompts", c.aift.num_prompts), ("max_pairs", c.aift.max_pairs),
        ("length_control", c.aift.length_control),
    ):  # fmt: skip
        need(len(values) >= 1, f"aift.{name}: at least one value")
    need(min(c.aift.num_prompts, default=1) >= 1, f"aift.num_prompts={c.aift.num_prompts}: at least 1")
    need(min(c.aift.max_pairs, default=0) >= 0, f"aift.max_pairs={c.aift.max_pairs}: not negative")
    need(
        all(0 <= rho < 0.5 for rho in c.aift.length_control),
        f"aift.length_control={c.aift.length_control}: in [0, 0.5), where good and bad cannot overlap",
    )
    need(c.aift.method in ("dpo", "positives"), f"aift.method={c.aift.method}: dpo or positives")
    need(c.aift.tie_break in ("index", "variance"), f"aift.tie_break={c.aift.tie_break}: index or variance")
    need(
        1 <= c.aift.min_judgments <= max(1, c.judge.k),
        f"aift.min_judgments={c.aift.min_judgments}: from 1 to judge.k={c.judge.k}",
    )
    need(
        c.judge.high <= c.judge.low or c.aift.positive_score <= c.judge.high,
        f"aift.positive_score={c.aift.positive_score}: at most judge.high={c.judge.high}",
    )
    need(c.aift.positive_weight > 0, f"aift.positive_weight={c.aift.positive_weight}: above 0")
    need(c.judge.score in ("sampled", "expected"), f"judge.score={c.judge.score}: sampled or expected")
    need(c.judge.stop in ("score", "end_of_turn"), f"judge.stop={c.judge.stop}: score or end_of_turn")
    endpoint = "://" in c.judge.model and not c.judge.model.startswith(("gs://", "s3://"))
    need(
        endpoint == bool(c.judge.endpoint_model),
        f"judge.endpoint_model={c.judge.endpoint_model!r}: needed with judge.model=URL, and only there",
    )
    need(
        not (c.aift.method == "positives" and c.judge.score == "expected"),
        "judge.score=expected: an expected score is never the highest, so aift.method=positives needs sampled",
    )
    need(
        not (endpoint and c.judge.score == "expected"),
        "judge.score=expected: an endpoint gives no probabilities of all scores; use sampled",
    )
    need(
        not (endpoint and (c.judge.top_k or c.judge.min_p)),
        f"judge.top_k={c.judge.top_k}, judge.min_p={c.judge.min_p}: an endpoint's interface has neither; leave both at 0",
    )
    for name, part in (("prompts", c.prompts), ("responses", c.responses), ("judge", c.judge)):
        found += [f"--config.{name}.{line}" for line in sampling(part)]
    need(c.responses.n >= 2, f"responses.n={c.responses.n}: a pair needs at least 2 candidates")
    need(
        c.responses.temperature > 0, "responses.temperature=0: greedy candidates are all the same, so no pair is left"
    )
    need(c.responses.top_k != 1, "responses.top_k=1: greedy candidates are all the same, so no pair is left")
    need(c.judge.k >= 1, f"judge.k={c.judge.k}: at least 1")
    need(c.check.k >= 1 and c.check.prompts >= 0, "check.k: at least 1; check.prompts: not negative")
    need(c.judge.low < c.judge.high, f"judge.low={c.judge.low}: below judge.high={c.judge.high}")
    need(
        c.engine.rows >= max(c.responses.n, c.judge.k, c.eft.k, c.check.k),
        f"engine.rows={c.engine.rows}: at least responses.n, judge.k, eft.k and check.k",
    )
    need(
        min(c.engine.window, c.engine.pad, c.engine.chunk) >= 1,
        "engine: window, pad and chunk are at least 1",
    )
    need(
        c.data.max_prompt_tokens < c.data.max_length,
        f"data.max_prompt_tokens={c.data.max_prompt_tokens}: below data.max_length={c.data.max_length}",
    )
    return found
