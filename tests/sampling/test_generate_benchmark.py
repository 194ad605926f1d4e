"""The benchmark of sampling: its arithmetic, what it refuses, its gguf files, and one small run of the whole."""

import argparse
import dataclasses
import importlib.util
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from small_runs import figures_of

from benchmarks import generate, generate_measures, gguf_file, pinned, rounds
from benchmarks.generate_work import Work
from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.model.config import LlamaConfig, RopeScaling
from selfreward_jax.weights import gguf_io, mapping, safetensors_io

WORK = Work("candidates", ((1, 2, 3), (4, 5)), samples=2, tokens=3)


def options(**changed):
    defaults = dict.fromkeys(generate.COUNTS, 1) | {"only": "candidates", "rivals": "hf_fp32", "hf_batches": "4"}
    return argparse.Namespace(**(defaults | {"oasst": ""} | changed))


def answering(monkeypatch, *replies):
    """Sides that give these replies one after the other; the orders are noted."""
    orders, left = [], list(replies)

    def ask(side, **order):
        orders.append(order)
        return {"seconds": 2.0, "core_share": 1.0, "threads": 1} | left.pop(0)

    monkeypatch.setattr(pinned, "ask", ask)
    return orders


def side(name="hf_fp32") -> Any:
    return SimpleNamespace(name=name)


def test_all_wrong_options_are_said_at_once():
    wrong = options(rounds=0, only="candidates,nothing", rivals="hf_fp16", hf_batches="4,x")
    with pytest.raises(UserError) as caught:
        generate.check(wrong)
    assert [line.split("=")[0].split(":")[0] for line in caught.value.args] == [
        "--rounds", "--only", "--rivals", "--hf_batches",
    ]  # fmt: skip


def test_the_sampling_half_is_left_out_without_its_file(capsys):
    asked = options(only="roof,candidates,sampling_half", hf_batches="8,2")
    generate.check(asked)
    assert (asked.only, asked.hf_batches) == (["candidates", "roof"], [8, 2])
    assert "--oasst" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing is left"):
        generate.check(options(only="sampling_half"))


def test_a_rival_that_is_not_installed_is_one_line(monkeypatch, capsys, small):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else name)
    asked = options(only=["candidates"], rivals=["hf_bf16", "llamacpp_f32"])
    assert generate.there(asked, small) == ["ours_fp32", "ours_bf16", "hf_bf16"]
    assert capsys.readouterr().out.splitlines() == [
        "llamacpp_f32 is left out: llama_cpp is not installed (the extra 'bench' has it)"
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    asked = options(only=["judging"], rivals=["hf_bf16", "llamacpp_f32"])
    assert generate.there(asked, small) == ["ours_bf16", "hf_bf16"]  # nothing is asked of llama.cpp there


def test_completions_of_another_length_are_an_error(monkeypatch):
    short = {"completions": [[[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [1, 2]]]}
    answering(monkeypatch, short, {"completions": short["completions"][:1]}, short)
    for _ in range(2):
        with pytest.raises(UserError, match="hf_fp32, candidates"):
            rounds.sample(side(), WORK, {"batch": 2})
    run, _ = rounds.sample(side(), dataclasses.replace(WORK, stop=(2,)), {"batch": 2})
    assert (run.tokens, run.completions, run.ended) == (11, 4, 1)


def test_the_batch_that_needs_least_a_prompt_is_chosen(monkeypatch):
    # 3 tokens: 1 + 2 x 0.5 = 2 s for one prompt; 1.5 + 2 x 1 = 3.5 s for two, 1.75 each.
    one, two = {"steps": [1.0, 1.5, 2.0]}, {"steps": [1.5, 2.5, 3.5]}
    orders = answering(monkeypatch, {"steps": [9.0, 9.1, 9.2]}, one, two)
    choice, estimates = rounds.faster_batch(side(), WORK, [2, 16, 1])
    assert (choice, estimates) == ({"batch": 2}, {"1": 2.0, "2": 1.75})
    assert [len(order["prompts"]) for order in orders] == [1, 1, 2]
    assert all(order["stop"] == () for order in orders)


def test_rounds_are_interleaved_and_medians_count():
    order = []

    def once(side):
        order.append(side.name)
        return [rounds.Run(float(len(order)), 60, 4, 1, 1.0, 1)]

    found = rounds.interleaved("test", [side("a"), side("b")], once, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    figures = rounds.figures([rounds.total(one) for one in found["a"]])  # 1, 4 and 5 seconds
    assert (figures["tokens_per_second"], figures["spread"], figures["ended_share"]) == (15.0, [12.0, 60.0], 0.25)
    two = rounds.total([found["a"][0][0], found["b"][0][0]])
    assert (two.seconds, two.tokens, two.completions) == (3.0, 120, 8)


def test_rounds_that_are_kept_are_not_done_again(tmp_path):
    sides, file, settings = [side("one"), side("two")], tmp_path / "kept", {"tokens": 4}
    done = []

    def once(side):
        done.append(side.name)
        if len(done) == 3:
            raise KeyboardInterrupt
        return [rounds.Run(float(len(done)), 4, 1, 0, 1.0, 1)]

    with pytest.raises(KeyboardInterrupt):
        rounds.interleaved("work", sides, once, 2, rounds.kept_in(file, settings))
    found = rounds.interleaved("work", sides, once, 2, rounds.kept_in(file, settings))
    assert done == ["one", "two", "two", "two", "one"]  # the third was cut off
    assert [[run.seconds for run in one] for one in found["one"]] == [[1.0], [5.0]]
    assert rounds.kept_in(file, settings).runs["work", "two", 1] == found["two"][1]
    assert not rounds.kept_in(file, {"tokens": 5}).runs
    file.write_text("{}\n")
    with pytest.raises(UserError, match="line 1"):
        rounds.kept_in(file, settings)


def test_ratios_are_of_tokens_and_of_completions():
    figures = {
        "ours_fp32": {"tokens_per_second": 90.0, "completions_per_second": 3.0},
        "ours_bf16": {"tokens_per_second": 30.0, "completions_per_second": 1.0},
        "hf_bf16": {"tokens_per_second": 10.0, "completions_per_second": 0.5},
    }
    assert generate_measures.ratios("judging", figures) == {"judging_vs_hf_bf16": 3.0}
    assert generate_measures.ratios("sampling_half", figures) == {
        "sampling_half_vs_hf_bf16": 3.0, "sampling_half_per_completion_vs_hf_bf16": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_counts_once_among_the_operations(tied):
    config = LlamaConfig(10, 4, layers=3, q_heads=2, kv_heads=1, head_dim=2, ffn=6, context=8, tied=tied)
    layer = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 6 + 2 * 4  # q, k, v, o, three of the mlp, two norms
    assert generate_measures.operations(config) == 2 * (3 * layer + 4 + 10 * 4)


def test_a_side_that_ends_says_why(tmp_path):
    with pytest.raises(UserError) as caught:
        pinned.start("other", "benchmarks.generate_sides", ["no such kind", "", ""], pinned.last_core(), tmp_path)
    assert caught.value.args[0].startswith("other: its process ended with 1")
    assert "KeyError: 'no such kind'" in caught.value.args[-1]


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_a_gguf_file_holds_the_same_weights(kind, tmp_path, mesh):
    config = LlamaConfig(
        vocab_size=48, embed=32, layers=2, q_heads=4, kv_heads=2, head_dim=8, ffn=64, context=16, rope_theta=5e4,
        tied=kind == "bf16",
    )  # fmt: skip
    params = llama.init(config, jax.random.key(0), "float32")
    safetensors_io.save(params, config, tmp_path, "float32")
    gguf_file.write(tmp_path, config, kind, tmp_path / "model.gguf")
    assert gguf_io.read_config(tmp_path / "model.gguf") == config
    read = mapping.flat(gguf_io.load(tmp_path / "model.gguf", config, mesh, "float32"))
    for path, expected in mapping.flat(params).items():
        wanted = np.asarray(expected)
        # bfloat16 keeps 8 bits; a block of 32 values has 127 steps up to its greatest, of a float16 length.
        bound = {"f32": 0.0, "bf16": 2.0**-8 * np.abs(wanted), "q8_0": np.abs(wanted).max() * (1 / 254 + 2.0**-11)}[
            kind
        ]
        assert (np.abs(np.asarray(read[path]) - wanted) <= bound).all(), path


def test_models_that_are_not_written_as_gguf(tmp_path, small):
    scaled = dataclasses.replace(small, rope_scaling=RopeScaling("linear", 2.0))
    with pytest.raises(UserError, match="RoPE scaling 'linear'"):
        gguf_file.write(tmp_path, scaled, "f32", tmp_path / "model.gguf")
    assert gguf_file.refusal(small, "f32") == "" and "blocks of 32" in gguf_file.refusal(small, "q8_0")


@pytest.mark.slow
def test_a_small_run(tmp_path):
    figures = figures_of(
        "benchmarks.generate", tmp_path, "--only=candidates,judging", "--prompts=2", "--tokens=4", "--judged=2",
        "--judgment_tokens=2", "--rivals=hf_fp32", "--hf_batches=1,2",
    )  # fmt: skip
    assert list(figures)[:2] == ["candidates_vs_hf_fp32", "judging_vs_hf_fp32"]
    assert figures["greedy_in_common"]["hf_fp32"] > 0.9
    for name, tokens in (("candidates", 2 * 4 * 4), ("judging", 2 * 3 * 2)):
        sides = figures["workloads"][name]
        assert {side: one["tokens"] for side, one in sides.items()} == {"ours_fp32": [tokens], "hf_fp32": [tokens]}
    assert figures["sides"]["hf_fp32"]["dtype"] == "float32"
