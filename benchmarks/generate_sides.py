"""The sides of benchmarks/generate.py: our engine, Hugging Face `generate` and llama.cpp, each in a process (pinned.py).

    python -m benchmarks.generate_sides CORE KIND FILE DTYPE

An order is {prompts, samples, tokens, stop, temperature, top_p, seed} and what the side alone understands:

    prompts  lists of token ids; each is completed `samples` times with at most `tokens` tokens
    stop     ids that end a completion; with none all completions have `tokens` tokens
    rows     ours: completions that are decoded together
    batch    Hugging Face: prompts that are given to `generate` together
    unified  llama.cpp: one cache for all sequences, or one each

A reply has `completions`, lists of ids, prompt by prompt. Every side has the prompts as ids and gives ids back, does
temperature before top-p, and takes the whole vocabulary into account (no top-k).
"""

import dataclasses
import importlib
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from benchmarks import pinned

UBATCH = 512  # tokens that llama.cpp computes at once (its default)
GEMM_ROWS = 2048
XLA_POOL = "tf_XLAEigen"  # what the threads of XLA's CPU backend that compute are called; beside it Python's own
Completions = list[list[list[int]]]


def open_ours(folder: str, dtype: str) -> tuple[dict[str, Any], pinned.Do]:
    """This project's engine; the one place that knows its interface. An order {gemm} measures the core instead."""
    import jax

    from selfreward_jax.data.chat import load_chat
    from selfreward_jax.loaded import open_engine
    from selfreward_jax.sampling import engine as engines
    from selfreward_jax.sampling.tokens import Sampling
    from selfreward_jax.weights.source import open_source

    source = open_source(folder)
    chat = load_chat(source.tokenizer, "own", source.eos_ids)
    engine = open_engine(source, chat, dtype, rows=1, part=1, pad=32)

    def sample(order: dict[str, Any]) -> Completions:
        each = order["samples"]
        requests = [
            engines.Request(tuple(ids), tuple(range(place * each, (place + 1) * each)))
            for place, ids in enumerate(order["prompts"])
        ]
        rows = min(order["rows"], len(requests) * each)
        sized = dataclasses.replace(
            engine, stop_ids=tuple(order["stop"]), rows=rows, cached=rows * 5 // 4, part=len(requests) * each
        )
        how = Sampling(order["temperature"], order["top_p"], order["tokens"])
        parts = engines.run(sized, how, requests, order["seed"], "benchmark")
        return [[list(one.ids) for one in some] for _, completions, _ in parts for some in completions]

    def do(order: dict[str, Any]) -> dict[str, Any]:
        if "gemm" in order:
            return {"gflops": gemm(source.config.embed, source.config.ffn)}
        return {"completions": sample(order)}

    pool = pinned.threads_named(XLA_POOL)
    if pool > 1:
        raise RuntimeError(f"XLA computes with {pool} threads; pin the process to one core")
    return {"dtype": dtype, "versions": {name: metadata.version(name) for name in ("jax", "jaxlib")},
            "devices": jax.device_count(), "xla_pool_threads": pool}, do  # fmt: skip


def gemm(embed: int, ffn: int) -> float:
    """The best rate of XLA's float32 matrix product with 2,048 rows on this core, GFLOP/s."""
    import jax
    import jax.numpy as jnp

    multiply, best = jax.jit(jnp.matmul), 0.0
    for inner, columns in ((GEMM_ROWS, GEMM_ROWS), (embed, ffn), (ffn, embed)):
        left = jax.random.normal(jax.random.key(0), (GEMM_ROWS, inner))
        right = jax.random.normal(jax.random.key(1), (inner, columns))
        multiply(left, right).block_until_ready()
        for _ in range(8):
            start = time.perf_counter()
            multiply(left, right).block_until_ready()
            best = max(best, 2 * GEMM_ROWS * inner * columns / (time.perf_counter() - start) / 1e9)
    return best


def open_hf(folder: str, dtype: str) -> tuple[dict[str, Any], pinned.Do]:
    """`generate` of transformers as its users call it: batches, left padding, `num_return_sequences`.

    Batches are made of prompts of like length. An order with `note_steps` gets `steps` too: the seconds after which
    each token of the last batch was there.
    """
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    pad = model.generation_config.pad_token_id or 0

    def batch(prompts: Sequence[Sequence[int]], order: dict[str, Any], steps: list[float]) -> list[list[int]]:
        width, begin = max(map(len, prompts)), time.perf_counter()
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

        def note(ids: Any, scores: Any, **_: Any) -> Any:
            steps.append(time.perf_counter() - begin)
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        how = {"do_sample": False}
        if order["temperature"]:
            how = {"do_sample": True, "temperature": order["temperature"], "top_p": order["top_p"], "top_k": 0}
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=order["tokens"], pad_token_id=pad,
            num_return_sequences=order["samples"], stopping_criteria=[note] if order.get("note_steps") else None, **how,
        )  # fmt: skip
        return [_to_end(row, order["stop"]) for row in made[:, width:].tolist()]

    def do(order: dict[str, Any]) -> dict[str, Any]:
        torch.manual_seed(order["seed"])
        model.generation_config.eos_token_id = order["stop"] or None
        prompts, samples, steps = order["prompts"], order["samples"], []
        places = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        found: dict[int, list[list[int]]] = {}
        with torch.inference_mode():
            for first in range(0, len(places), order["batch"]):
                some = places[first : first + order["batch"]]
                steps.clear()
                rows = batch([prompts[place] for place in some], order, steps)
                found |= {place: rows[at * samples : (at + 1) * samples] for at, place in enumerate(some)}
        return {"completions": [found[place] for place in range(len(prompts))], "steps": steps}

    names = ("torch", "transformers")
    return {"dtype": dtype, "versions": {name: metadata.version(name) for name in names},
            "attention": model.config._attn_implementation}, do  # fmt: skip


def _to_end(ids: list[int], stop: Sequence[int]) -> list[int]:
    """Up to the first stop id, which is kept: what follows it is padding."""
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in stop), ids)


def open_llamacpp(file: str, dtype: str) -> tuple[dict[str, Any], pinned.Do]:
    """llama.cpp, all completions in one batch a step; each prompt is read once and its cache given to its samples.

    Its own float16 cache and its own choice of attention. It knows no `stop` here.
    """
    cpp: Any = importlib.import_module("llama_cpp")
    cpp.llama_backend_init()
    model = cpp.llama_model_load_from_file(file.encode(), cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {file}")
    held: dict[tuple[int, ...], Any] = {}

    def context(cells: int, tokens: int, sequences: int, unified: bool) -> Any:
        """Made once for orders of one size, of which there are few, and cleared for each."""
        key = (cells, tokens, sequences, unified)
        if key not in held:
            how = cpp.llama_context_default_params()
            how.n_ctx, how.n_batch, how.n_ubatch, how.n_seq_max = cells, tokens, UBATCH, sequences
            how.n_threads = how.n_threads_batch = 1
            how.kv_unified = unified
            held[key] = cpp.llama_init_from_model(model, how)
            if not held[key]:
                raise RuntimeError(f"llama.cpp cannot make a context of {cells} cells for {sequences} sequences")
        cpp.llama_memory_clear(cpp.llama_get_memory(held[key]), False)
        return held[key]

    def sampler(order: dict[str, Any], row: int) -> Any:
        chain = cpp.llama_sampler_chain_init(cpp.llama_sampler_chain_default_params())
        parts = [cpp.llama_sampler_init_greedy()]
        if order["temperature"]:
            seed = order["seed"] * 1_000_003 + row
            parts = [cpp.llama_sampler_init_temp(order["temperature"]),
                     cpp.llama_sampler_init_top_p(order["top_p"], 1), cpp.llama_sampler_init_dist(seed)]  # fmt: skip
        for part in parts:
            cpp.llama_sampler_chain_add(chain, part)
        return chain

    def do(order: dict[str, Any]) -> dict[str, Any]:
        prompts, samples, unified = order["prompts"], order["samples"], order["unified"]
        rows, total = len(prompts) * samples, sum(map(len, prompts))
        longest = -(-(max(map(len, prompts)) + order["tokens"]) // 256) * 256
        cells = -(-(total + rows * order["tokens"]) // 256) * 256 if unified else rows * longest
        here = context(cells, max(total, rows), rows, unified)
        memory = cpp.llama_get_memory(here)
        samplers = [sampler(order, row) for row in range(rows)]
        batch = cpp.llama_batch_init(max(total, rows), 0, 1)

        def put(at: int, token: int, position: int, sequence: int, wanted: bool) -> None:
            batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence

        def decode(count: int) -> None:
            batch.n_tokens = count
            if code := cpp.llama_decode(here, batch):
                raise RuntimeError(f"llama_decode returned {code}")

        at, ends = 0, []
        for place, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                put(at, token, position, place * samples, position == len(prompt) - 1)
                at += 1
            ends.append(at - 1)
        decode(at)
        for row in range(rows):
            if row % samples:
                cpp.llama_memory_seq_cp(memory, row - row % samples, row, -1, -1)
        made = [[cpp.llama_sampler_sample(samplers[row], here, ends[row // samples])] for row in range(rows)]
        for step in range(order["tokens"] - 1):
            for row, ids in enumerate(made):
                put(row, ids[-1], len(prompts[row // samples]) + step, row, True)
            decode(rows)
            for row, ids in enumerate(made):
                ids.append(cpp.llama_sampler_sample(samplers[row], here, row))
        for chain in samplers:
            cpp.llama_sampler_free(chain)
        cpp.llama_batch_free(batch)
        return {"completions": [made[first : first + samples] for first in range(0, rows, samples)]}

    about = {
        "dtype": dtype,
        "cache": "float16",
        "versions": {"llama-cpp-python": metadata.version("llama-cpp-python")},
    }
    return about | {"system": cpp.llama_print_system_info().decode().strip()}, do


OPEN = {"ours": open_ours, "hf": open_hf, "llamacpp": open_llamacpp}


def main() -> None:
    core, kind, file, dtype = sys.argv[1:]
    pinned.serve(lambda: OPEN[kind](file, dtype), int(core))


if __name__ == "__main__":
    main()
