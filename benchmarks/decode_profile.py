"""Where the time of a decode step goes on one core, by the parts of the model, and how near each is to the matrix roof.

The program is the engine's own (`sampling.decode.advance`) over the demo model, all rows busy. jax's profiler says how
long each instruction ran, the compiled program which part of the model it belongs to. The roof is the rate of XLA's
own float32 matrix product with 2,048 rows, measured in the same run on the same core (`generate_sides.gemm`).

    taskset -c 0 python -m benchmarks.decode_profile --dtype=float32 --out=benchmarks/results/decode_profile.json

The process must have one core: XLA makes a thread for each. The last line is one JSON object.
"""

import argparse
import collections
import gzip
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import pinned
from benchmarks.figures import hand_over, scope_of
from benchmarks.generate_measures import operations
from benchmarks.generate_sides import XLA_POOL, gemm
from selfreward_jax.cli import exit_code
from selfreward_jax.data.chat import load_chat
from selfreward_jax.errors import UserError
from selfreward_jax.loaded import open_engine
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.observe.progress import say
from selfreward_jax.sampling import decode
from selfreward_jax.sampling.stopping import stop_table
from selfreward_jax.sampling.tokens import Sampling
from selfreward_jax.sharding.place import place, replicate
from selfreward_jax.weights.source import Source, open_source

WRAPPERS = ("while", "call", "condition", "body")  # events that hold others


def scopes_of(program: str) -> dict[str, str]:
    """The part of the model that each instruction of a compiled program's text belongs to.

    Those that the compiler put there itself belong to none: "copies", if they are that, or "other".
    """
    found = {}
    for name, operation, rest in re.findall(r"%?([\w.\-]+) = [^=]*? ([\w\-]+)\((.*)", program):
        nowhere = "copies" if operation.startswith("copy") or "copy" in name else "other"
        found[name] = scope_of(rest, nowhere)
    return found


def seconds_by_scope(folder: Path, scopes: dict[str, str]) -> dict[str, float]:
    """Sums of the instructions' times in a trace that jax's profiler has written."""
    (file,) = folder.rglob("*.trace.json.gz")
    total: collections.Counter[str] = collections.Counter()
    for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]:
        name = event.get("name", "")
        if event.get("ph") == "X" and name in scopes and not name.startswith(WRAPPERS):
            total[scopes[name]] += event["dur"] / 1e6
    return dict(total)


def profile(arguments: argparse.Namespace, source: Source) -> dict[str, Any]:
    """Milliseconds of a step, in all and by scope."""
    chat = load_chat(source.tokenizer, "own", source.eos_ids)
    rows, samples, config = arguments.rows, arguments.samples, source.config
    made = open_engine(source, chat, arguments.dtype, rows, rows, pad=32)
    if pinned.threads_named(XLA_POOL) > 1:
        raise UserError("more than one core: start it with `taskset -c 0`")
    how = Sampling(0.7, 0.9, max_new_tokens=arguments.tokens)
    program = decode.Program(config, made.compute, how, made.vocabulary)
    rng, count = np.random.default_rng(0), rows // samples
    with jax.set_mesh(made.mesh):
        table = replicate(stop_table((), made.vocabulary), made.mesh)
        tokens = rng.integers(0, made.vocabulary, (1, arguments.shared)).astype(np.int32)
        prefix = (decode.prefix_keys(config, made.compute, made.params, replicate(tokens, made.mesh)),) if arguments.shared else ()
        inputs = decode.Inputs(made.params, np.uint32(0), np.uint32(0), prefix, table)
        slots = decode.blank(program, made.params, count, samples, arguments.prompt)
        prompts = rng.integers(0, made.vocabulary, (count, arguments.prompt)).astype(np.int32)
        keys = np.arange(rows, dtype=np.int32).reshape(count, samples)
        lengths = np.full(count, arguments.prompt, np.int32)
        read = decode.read(program, inputs, *(place(x, made.mesh, made.rules) for x in (prompts, lengths, keys)))
        slots = decode.insert(slots, *read, place(np.arange(count, dtype=np.int32), made.mesh, made.rules))
        decoding = program._replace(compute=made.decode_compute)
        more = tuple(map(np.int32, (arguments.steps, count + 1, rows, 0)))
        compiled = decode.advance.lower(decoding, inputs, slots, rows, *more).compile()
        timings = []
        for _ in range(arguments.rounds):
            begin = time.perf_counter()
            slots, report = compiled(inputs, slots, *more)
            report.done.block_until_ready()
            timings.append((time.perf_counter() - begin) / arguments.steps)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                slots, report = compiled(inputs, slots, *more)
                report.done.block_until_ready()
            parts = seconds_by_scope(Path(folder), scopes_of(compiled.as_text()))
        if not (~np.asarray(report.done)).all():
            raise UserError(f"--tokens={arguments.tokens}: rows ended before the profile did; allow more")
    return {
        "step_ms": round(statistics.median(timings) * 1e3, 2), "spread_ms": [round(f(timings) * 1e3, 2) for f in (min, max)],
        "by_scope_ms": {name: round(parts[name] / arguments.steps * 1e3, 2) for name in sorted(parts, key=lambda n: -parts[n])},
        "operations_gflop": round(operations(config) * rows / 1e9, 3),
    }  # fmt: skip


def roof(config: LlamaConfig, rows: int) -> dict[str, Any]:
    """What the matrices of a step would take at the roof's rate, by scope."""
    best, d, f = gemm(config.embed, config.ffn), config.embed, config.ffn
    heads, kv = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    layer = {"qkv": d * (heads + 2 * kv), "attention_out": heads * d, "mlp": 3 * d * f}
    weights = {name: count * config.layers for name, count in layer.items()} | {"head": d * config.vocab_size}
    return {
        "gemm_fp32_gflops": round(best, 1),
        "roof_ms": {name: round(2 * count * rows / best / 1e6, 2) for name, count in weights.items()},
    }


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table and the JSON line."""
    if arguments.rows % arguments.samples or arguments.rows < 1:
        raise UserError(f"--rows={arguments.rows}: a multiple of --samples={arguments.samples}")
    needed = arguments.steps * (arguments.rounds + 1) + 2
    if arguments.tokens < needed:
        raise UserError(f"--tokens={arguments.tokens}: at least {needed} for these --steps and --rounds")
    jax.config.update("jax_platforms", "cpu")
    source = open_source(arguments.model)
    found = profile(arguments, source) | roof(source.config, arguments.rows)
    say(f"{'part':>14} {'ms':>8} {'share':>6} {'at the roof':>12}")
    for name, taken in found["by_scope_ms"].items():
        at_roof = found["roof_ms"].get(name)
        say(f"{name:>14} {taken:>8.2f} {taken / found['step_ms']:>6.1%} {'' if at_roof is None else at_roof:>12}")
    say(f"{'a step':>14} {found['step_ms']:>8.2f} {found['spread_ms']}")
    found["roof_share"] = round(sum(found["roof_ms"].values()) / found["step_ms"], 3)
    asked = {name: getattr(arguments, name) for name in ("model", "dtype", "rows", "samples", "prompt", "shared", "tokens", "steps")}
    found |= {"settings": asked, "cpu": pinned.cpu_name(), "jax": jax.__version__}
    hand_over(found, arguments.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", default="demo", help="as convert's --source (default %(default)s: SmolLM2-135M-Instruct)")
    option("--dtype", default="float32", choices=("float32", "bfloat16"))
    option("--rows", type=int, default=128, help="completions that are decoded together (default %(default)s)")
    option("--samples", type=int, default=4, help="of each prompt (default %(default)s)")
    option("--prompt", type=int, default=64, help="tokens of each prompt (default %(default)s)")
    option("--shared", type=int, default=0, help="tokens that all prompts begin with, beside those (default %(default)s)")
    option("--tokens", type=int, default=128, help="of a completion at most: the size of the caches (default %(default)s)")
    option("--steps", type=int, default=8, help="of a timing (default %(default)s)")
    option("--rounds", type=int, default=5, help="timings; medians count (default %(default)s)")
    option("--out", default="", help="a file for the last line too")
    return exit_code(lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
