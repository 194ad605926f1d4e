"""What a run will cost, before it starts: generations, bytes and a rough time; and whether this host can hold it."""

from __future__ import annotations

import os
import shutil
import time

import jax
import jax.numpy as jnp
from etils import epath

from selfreward_jax import stores, workdir
from selfreward_jax.config import Config, TrainConfig, models, of_model
from selfreward_jax.data.seeds import measuring_sets
from selfreward_jax.errors import UserError
from selfreward_jax.sharding.choose import memory_here

_WIDTH = {"float32": 4, "bfloat16": 2}
# Share of the matmul rate that decoding and training reach; measured for a 135M model on one CPU core: 37-38 %.
EFFICIENCY = 0.35
# Ranked sets that are counted for eft.train_sets=-1, as many as there are: a guess before the data are read.
SETS_GUESSED = 2000


def training_bytes(config: Config) -> int:
    """Bytes a parameter while training: it, its moments, the summed gradient (float32) and a microbatch's.

    Adafactor's moments, a row and a column of each matrix, are too few to count.
    """
    width = _WIDTH[config.model.param_dtype]
    return max(width + 4 + width + _moments(part) for part in (config.sft, config.dpo))


def _moments(part: TrainConfig) -> int:
    return 2 * _WIDTH[part.moments] if part.optimizer == "adamw" else 0


def disk_here(root: epath.Path) -> int | None:
    """Free bytes where the workdir will be; None for an object store."""
    if stores.is_remote(root):
        return None
    path = os.path.abspath(os.fspath(root))
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def disk_used(root: epath.Path) -> int:
    """Bytes of the files that an earlier start left in a local workdir."""
    here = os.fspath(root)
    return sum(
        os.path.getsize(path)
        for folder, _, names in os.walk(here)
        for path in (os.path.join(folder, name) for name in names)
        if os.path.isfile(path)
    )


def disk_needed(config: Config, parameters: int) -> int:
    """Peak bytes of the workdir: parameters and export of the models so far, and the checkpoints of the one in training."""
    kept = peak = 0
    for model in models(config.target):
        part = config.sft if model in ("sft", "m1") or config.aift.method == "positives" else config.dpo
        params = _WIDTH[config.model.param_dtype]
        writing = (part.keep + 1) * (params + _moments(part)) if part.checkpoint_every else 0
        peak = max(peak, kept + writing + params)
        kept += params + _WIDTH[config.model.export_dtype]
    return parameters * max(peak, kept)


def check_host(config: Config, root: epath.Path, parameters: int) -> None:
    """Refuses a run that can't fit here, before anything is downloaded.

    Raises:
        UserError: bytes needed and bytes here, for memory and disk.
    """
    lines = []
    need, have = parameters * training_bytes(config), memory_here()
    if have and need > have:
        lines.append(
            f"training {parameters / 1e9:.2f} billion parameters needs {need / 1e9:,.1f} GB of device memory,"
            f" here are {have / 1e9:,.1f} GB; use the preset :demo (--config=configs/m3.py:demo) or a larger slice"
        )
    need_disk, have_disk = disk_needed(config, parameters), disk_here(root)
    if have_disk is not None and need_disk > have_disk + disk_used(root):
        lines.append(
            f"--workdir={root}: {_size(need_disk)} needed on disk, {_size(have_disk)} are free;"
            " take another folder or the preset :demo"
        )
    if lines:
        raise UserError(*lines)


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def generations(config: Config) -> dict[str, tuple[int, int]]:
    """Completions and new tokens at most, by stage."""
    out: dict[str, tuple[int, int]] = {}
    held_out = 3 * max(0, config.eft.eval_sets)
    own = measuring_sets(config.eft, config.judge.low, config.judge.high)
    held_out += sum(len(ranked.replies) for ranked in own)
    check_votes = (config.check.prompts + held_out) * config.check.k
    for model in models(config.target):
        if model == "m1" and config.eft.source == "build":
            sets = SETS_GUESSED if config.eft.train_sets == -1 else config.eft.train_sets
            judged = 3 * sets * config.eft.k
            out["m1/eft"] = (judged, judged * config.judge.max_new_tokens)
        if model not in ("sft", "m1"):
            wanted = of_model(config.aift.num_prompts, model)
            if config.prompts.source == "self_instruct":
                # Seven new prompts a request at most; about half are kept (Wang et al. 2023).
                rounds = -(-wanted // (3 * config.prompts.requests))
                asked = min(rounds, config.prompts.max_rounds) * config.prompts.requests
                out[f"{model}/prompts"] = (asked, asked * config.prompts.max_new_tokens)
            count = wanted * config.responses.n
            out[f"{model}/responses"] = (count, count * config.responses.max_new_tokens)
            out[f"{model}/judgments"] = (count * config.judge.k, count * config.judge.k * config.judge.max_new_tokens)
        tokens = config.check.prompts * config.responses.max_new_tokens + check_votes * config.judge.max_new_tokens
        out[f"{model}/check"] = (config.check.prompts + check_votes, tokens)
    return out


def training_tokens(config: Config, model: str) -> int:
    """Rough tokens that a training stage reads: 300 an example of seed data, 600 a judge example."""
    examples = max(0, config.data.ift_examples) * 300
    if model != "sft" and config.eft.source != "none":
        examples += (72 if config.eft.source == "file" else 1630) * 600
    if model not in ("sft", "m1") and config.aift.method == "dpo":
        pairs = min(of_model(config.aift.num_prompts, model), of_model(config.aift.max_pairs, model) or 10**9)
        return pairs * 2 * (config.responses.max_new_tokens + 100) * config.dpo.epochs
    if model not in ("sft", "m1"):
        examples += of_model(config.aift.num_prompts, model) * (config.responses.max_new_tokens + 100)
    return examples * config.sft.epochs


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a 2048-cubed matmul on one device here, the best of three."""
    a = jnp.ones((2048, 2048), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    times = []
    for _ in range(3):
        began = time.monotonic()
        product(a).block_until_ready()
        times.append(time.monotonic() - began)
    return 2 * 2048**3 / min(times) * (1 if jax.default_backend() == "cpu" else jax.device_count())


def table(config: Config, root: epath.Path, stages: list[str], parameters: int) -> list[str]:
    """Lines of the dry run: a line a stage, then bytes and time."""
    rate = matmul_rate(config.model.compute_dtype) * EFFICIENCY
    counts = generations(config)
    lines, total = [], 0.0
    for name in stages:
        model, kind = name.split("/")
        flops, what = 0.0, ""
        if name in counts:
            some, tokens = counts[name]
            flops = 2.0 * parameters * tokens * 2  # and about as many prompt tokens
            what = f"{some:>8,} generations"
        elif kind == "train":
            flops = 8.0 * parameters * training_tokens(config, model)  # 2 forward, 4 backward, 2 recomputed
            what = "training"
        done = workdir.is_done(root, name)
        total += 0.0 if done else flops / rate
        lines.append(
            f"{name:<16} {what:<22} {'done' if done else f'about {flops / rate:,.0f} s' if flops else ''}".rstrip()
        )
    width = _WIDTH[config.model.param_dtype]
    if "m1/eft" in counts and config.eft.train_sets == -1:
        lines.append(f"eft.train_sets=-1: counted as {SETS_GUESSED:,} ranked sets, a guess; the data decide")
    lines += [
        f"generations {sum(some for some, _ in counts.values()):,}",
        f"time about {total / 60:,.0f} min at {rate / 1e9:,.0f} GFLOP/s (a matmul timed here x {EFFICIENCY}; a guess, not a measurement)",
        f"bytes: parameters {parameters * width:,}, training {parameters * training_bytes(config):,} of {memory_here():,} here,"
        f" workdir up to {disk_needed(config, parameters):,} of {disk_here(root) or 0:,} free",
    ]
    return lines
