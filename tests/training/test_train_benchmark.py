"""The benchmark of training: what it refuses, and one small run beside a plain torch step."""

import argparse
from types import SimpleNamespace

import pytest
from small_runs import figures_of

from benchmarks import pinned, train
from selfreward_jax.errors import UserError

WORK = train.Work({"task": "sft", "sequences": []}, 100)
REPLY = {"seconds": 2.0, "core_share": 1.0, "threads": 1, "peak_mb": 10.0, "positions": 100, "loss": 1.0}


@pytest.fixture
def sides(monkeypatch):
    """Gives sides that answer with the replies in turn."""

    def answering(**replies):
        left = {name: iter(some) for name, some in replies.items()}
        monkeypatch.setattr(pinned, "ask", lambda side, **order: REPLY | next(left[side.name]))
        return [SimpleNamespace(name=name, about={}) for name in replies]

    return answering


def test_medians_and_the_first_losses_are_given(sides):
    taken = sides(
        ours_fp32=[{}, {"seconds": 4.0}, {"seconds": 1.0}, {"seconds": 2.0, "peak_mb": 30.0}], torch_fp32=[{"loss": 1.001}] * 4
    )
    found = train.workload("sft_judge", taken, WORK, 3)
    ours = found["ours_fp32"]
    assert (ours["seconds"], ours["spread"], ours["tokens_per_second"], ours["peak_mb"]) == (2.0, [1.0, 4.0], 50.0, 30.0)
    assert found["torch_fp32"]["loss"] == 1.001


def test_other_losses_are_another_update(sides):
    with pytest.raises(UserError, match=r"torch_fp32: a loss of 1\.01000, ours 1\.00000: not the same update"):
        train.workload("sft_judge", sides(ours_fp32=[{}], torch_fp32=[{"loss": 1.01}]), WORK, 1)


def test_what_compiles_in_a_timed_update_is_refused(sides):
    with pytest.raises(UserError, match="ours_fp32: 2 programs were compiled in a timed update"):
        train.workload("sft_judge", sides(ours_fp32=[{"compiled": 3}, {"compiled": 2}]), WORK, 1)


def test_lengths_are_as_documented():
    from selfreward_jax.data.chat import load_chat
    from selfreward_jax.weights.source import open_source

    source = open_source("random:tiny")
    chat = load_chat(source.tokenizer, "own", source.eos_ids)
    pairs = train.fixed_pairs(chat)
    assert [(len(ids), start) for ids, start in pairs] == [(256, 64)] * 8
    assert all(pairs[i][0][:64] == pairs[i + 1][0][:64] and pairs[i] != pairs[i + 1] for i in range(0, 8, 2))
    assert {len(ids) - start for ids, start in train.judge_examples(chat)} == {60}
    with pytest.raises(UserError, match="--real=999"):
        train.real_pairs(chat, 999)


def test_what_leaves_nothing_to_measure_is_refused():
    asked = argparse.Namespace(only="linear", sides="ours_bf16,trl_fp32", rounds=1, real=1)
    with pytest.raises(UserError, match="nothing of ours is left to measure"):
        train.run(asked)


@pytest.mark.slow
def test_a_small_run(tmp_path):
    figures = figures_of("benchmarks.train", tmp_path, "--only=sft_judge,linear", "--sides=ours_fp32,torch_fp32")
    assert list(figures)[:2] == ["sft_judge_vs_torch_fp32", "linear"]
    judged = figures["workloads"]["sft_judge"]
    assert judged["ours_fp32"]["positions"] < judged["torch_fp32"]["positions"]  # the rubric is shared
    assert judged["ours_fp32"]["tokens"] == judged["torch_fp32"]["tokens"]
