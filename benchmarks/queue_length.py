"""Sampling 64 to 4,096 queued requests: tokens per second and memory should not depend on how many there are.

Packaged prompts are taken in turn; every completion has the same length, so that only the queue differs. Sizes are
sampled in turn, `--rounds` times; medians count. Memory is what the process holds after each size (and its peak).

    taskset -c 0 python -m benchmarks.queue_length --out=benchmarks/results/queue_length.json

The last line is one JSON object.
"""

import argparse
import dataclasses
import statistics
import sys
import time

import jax

from benchmarks import pinned
from benchmarks.figures import hand_over
from selfreward_jax.cli import exit_code
from selfreward_jax.data.chat import encode_prompt, load_chat
from selfreward_jax.data.seeds import prompt_texts
from selfreward_jax.errors import UserError
from selfreward_jax.loaded import open_engine
from selfreward_jax.observe.progress import progress, say
from selfreward_jax.sampling import engine as engines
from selfreward_jax.sampling.tokens import Sampling
from selfreward_jax.weights.source import open_source


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a line a size and the JSON."""
    sizes = [int(word) for word in arguments.sizes.split(",") if word.isdecimal() and int(word)]
    if len(sizes) != len(arguments.sizes.split(",")):
        raise UserError(f"--sizes={arguments.sizes}: whole numbers above 0 with commas between them")
    jax.config.update("jax_platforms", "cpu")
    source = open_source(arguments.model)
    chat = load_chat(source.tokenizer, "own", source.eos_ids)
    engine = open_engine(source, chat, arguments.dtype, arguments.rows, arguments.part, pad=32)
    engine = dataclasses.replace(engine, stop_ids=())  # all completions are of one length
    texts = [tuple(encode_prompt(chat, text)) for _, text in prompt_texts("", "test.jsonl")]
    how = Sampling(0.7, 0.9, max_new_tokens=arguments.tokens)
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    memory: dict[int, list[float]] = {size: [] for size in sizes}
    sized = {
        size: [
            engines.Request(texts[i % len(texts)], tuple(range(i * arguments.samples, (i + 1) * arguments.samples)))
            for i in range(size)
        ]
        for size in sizes
    }

    def sample(size: int) -> float:
        begin, tokens = time.perf_counter(), 0
        for _, _, counts in engines.run(engine, how, sized[size], 0, "queue"):
            tokens += counts.tokens
        if tokens != size * arguments.samples * arguments.tokens:
            raise UserError(f"{size} requests: {tokens} tokens, {size * arguments.samples * arguments.tokens} were asked for")
        return tokens / (time.perf_counter() - begin)

    for size in sizes[:2]:  # compiles
        sample(size)
    with progress("queue", arguments.rounds * len(sizes), "runs") as advance:
        for number in range(arguments.rounds):
            for size in sizes if number % 2 == 0 else sizes[::-1]:
                rates[size].append(sample(size))
                memory[size].append(pinned.memory("VmRSS") / 1e6)
                advance(1, f"{size} requests: {rates[size][-1]:.1f} tokens/s")
    medians = {size: statistics.median(rates[size]) for size in sizes}
    figures = {
        "tokens_per_second": {size: round(medians[size], 1) for size in sizes},
        "spread": {size: [round(f(rates[size]), 1) for f in (min, max)] for size in sizes},
        "slowest_over_fastest": round(min(medians.values()) / max(medians.values()), 4),
        "held_mb": {size: round(statistics.median(memory[size]), 1) for size in sizes},
        "peak_mb": round(pinned.memory("VmHWM") / 1e6, 1),
        "settings": {name: getattr(arguments, name) for name in ("model", "dtype", "rows", "part", "samples", "tokens", "rounds")},
        "cpu": pinned.cpu_name(), "jax": jax.__version__,
    }  # fmt: skip
    for size in sizes:
        say(f"{size:>6} requests {medians[size]:>9.1f} tokens/s {figures['spread'][size]} {figures['held_mb'][size]} MB held")
    hand_over(figures, arguments.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", default="random:tiny", help="the smaller it is the more the queue shows (default %(default)s)")
    option("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    option("--sizes", default="64,256,1024,4096", help="requests (default %(default)s)")
    option("--rows", type=int, default=48, help="completions that are decoded together (default %(default)s)")
    option("--part", type=int, default=256, help="completions of a part (default %(default)s)")
    option("--samples", type=int, default=4, help="completions of a request (default %(default)s)")
    option("--tokens", type=int, default=8, help="of each completion (default %(default)s)")
    option("--rounds", type=int, default=3, help="timed runs of each size (default %(default)s)")
    option("--out", default="", help="a file for the last line too")
    return exit_code(lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
