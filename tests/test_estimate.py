"""What a run will cost, and whether this host can hold it."""

import re
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

from selfreward_jax import estimate, launch, presets, recipe
from selfreward_jax.config import from_config_dict
from selfreward_jax.errors import UserError


def config_of(target="m3", preset="tiny", **groups):
    raw = presets.get(target, preset)
    for group, fields in groups.items():
        for field, value in fields.items():
            raw[group][field] = value
    return from_config_dict(raw)


def test_generations_of_the_paper_are_those_of_its_loop():
    counts = estimate.generations(config_of("m3", "llama2_70b"))
    assert counts["m2/responses"] == (8000 * 4, 8000 * 4 * 1024)
    assert counts["m2/judgments"] == (8000 * 4 * 3, 8000 * 4 * 3 * 256)
    assert counts["m1/eft"] == (3 * 2000, 3 * 2000 * 256)
    assert counts["m3/responses"] == (14000 * 4, 14000 * 4 * 1024)
    # 64 answers, and 3 judgments of each and of three replies of each of the 190 held-out sets
    votes = 3 * (64 + 3 * 190)
    assert counts["sft/check"] == (64 + votes, 64 * 1024 + votes * 256)
    assert {name.split("/")[0] for name in counts} == {"sft", "m1", "m2", "m3"}


def test_sets_that_the_data_decide_are_guessed_and_the_dry_run_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(estimate, "matmul_rate", lambda dtype: 1e11)
    few = config_of("m1", eft={"source": "build", "train_sets": 7})
    assert estimate.generations(few)["m1/eft"][0] == 3 * 7
    rest = config_of("m1", eft={"source": "build", "train_sets": -1})
    assert estimate.generations(rest)["m1/eft"][0] == 3 * 2000
    counted, guessed = (estimate.table(some, epath.Path(tmp_path), ["m1/eft"], 1000) for some in (few, rest))
    assert "eft.train_sets=-1: counted as 2,000 ranked sets, a guess; the data decide" in guessed
    assert len(counted) == len(guessed) - 1


def test_generations_of_the_demo_count_the_held_out_judge_examples_and_no_building_of_eft():
    demo = config_of("m3", "demo")
    counts = estimate.generations(demo)
    assert "m1/eft" not in counts
    assert counts["m2/responses"][0] == demo.aift.num_prompts[0] * 4
    held_out = 24 + 3 * demo.eft.eval_sets
    assert counts["m1/check"][0] == demo.check.prompts + (demo.check.prompts + held_out) * demo.check.k


def test_prompts_are_asked_for_in_whole_rounds_and_not_at_all_with_a_file():
    rounds, aift = {"requests": 8, "max_rounds": 50}, {"num_prompts": (100, 24)}
    both = estimate.generations(config_of("m3", prompts=rounds, aift=aift))
    assert (both["m2/prompts"][0], both["m3/prompts"][0]) == (5 * 8, 8)
    few = config_of("m2", prompts=rounds | {"max_rounds": 2}, aift=aift)
    assert estimate.generations(few)["m2/prompts"][0] == 2 * 8
    named = config_of("m2", prompts=rounds | {"source": "mine.jsonl"}, aift=aift)
    assert "m2/prompts" not in estimate.generations(named)


def test_generations_grow_with_the_target():
    models = [
        {name.split("/")[0] for name in estimate.generations(config_of(target))} for target in ("sft", "m1", "m5")
    ]
    assert models == [{"sft"}, {"sft", "m1"}, {"sft", "m1", "m2", "m3", "m4", "m5"}]


def test_training_tokens_follow_the_data_and_the_epochs():
    one, two = (config_of(sft={"epochs": epochs}, dpo={"epochs": epochs}) for epochs in (1, 2))
    for model in ("sft", "m1", "m2"):
        assert estimate.training_tokens(two, model) == 2 * estimate.training_tokens(one, model) > 0
    assert estimate.training_tokens(one, "m1") > estimate.training_tokens(one, "sft")


def test_disk_is_the_models_so_far_and_the_checkpoints_of_the_one_in_training():
    plain = {"checkpoint_every": 0}
    none = config_of("m3", sft=plain, dpo=plain, model={"export_dtype": "bfloat16"})
    assert estimate.disk_needed(none, 1000) == 1000 * 4 * (4 + 2)  # SFT, M1, M2, M3: float32 and a bf16 export
    kept = config_of("m1", sft={"checkpoint_every": 5, "keep": 2}, model={"export_dtype": "bfloat16"})
    # While M1 trains: SFT, its own parameters, and three states of parameters and two moments
    assert estimate.disk_needed(kept, 1000) == 1000 * ((4 + 2) + 4 + 3 * 12)
    export = config_of("m3", sft=plain, dpo=plain, model={"export_dtype": "float32"})
    assert estimate.disk_needed(export, 1000) == 1000 * 4 * (4 + 4)


@pytest.fixture
def host(monkeypatch):
    """`host(memory, disk)`: this host has so many bytes."""

    def make(memory, disk):
        monkeypatch.setattr(estimate, "memory_here", lambda: memory)
        monkeypatch.setattr(estimate, "disk_here", lambda root: disk)

    return make


def refusal(config, root, parameters):
    with pytest.raises(UserError) as caught:
        estimate.check_host(config, epath.Path(root), parameters)
    assert all("\n" not in line for line in caught.value.args)
    return caught.value.args


def test_a_host_without_the_memory_is_refused_with_both_figures(host, tmp_path):
    host(8 * 10**9, 10**15)
    (line,) = refusal(config_of("m2", "llama2_70b"), tmp_path, 68_976_648_192)
    assert "68.98 billion parameters needs 1,379.5 GB of device memory, here are 8.0 GB" in line
    assert ":demo" in line


def test_a_host_without_the_disk_is_refused_with_both_figures(host, tmp_path):
    host(10**15, 10**9)
    (line,) = refusal(config_of("m3", "demo"), tmp_path, 134_515_008)
    assert line.startswith(f"--workdir={tmp_path}: ")
    assert re.search(r" \d\.\d GB needed on disk, 1\.0 GB are free; .*:demo", line)


def test_memory_and_disk_are_refused_together(host, tmp_path):
    host(1, 1)
    assert len(refusal(config_of(), tmp_path, 10**9)) == 2


def test_what_fits_or_cannot_be_known_is_let_pass(host, tmp_path):
    config = config_of()
    host(10**15, 10**15)
    estimate.check_host(config, epath.Path(tmp_path), 10**6)
    host(0, None)  # devices that don't tell, and an object store
    estimate.check_host(config, epath.Path(tmp_path), 10**6)


def test_what_an_earlier_start_left_counts_as_room(host, tmp_path):
    config = config_of(model={"export_dtype": "float32"})
    need = estimate.disk_needed(config, 1000)
    host(10**15, need - 5000)
    refusal(config, tmp_path, 1000)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "params").write_bytes(b"0" * 5000)
    assert estimate.disk_used(epath.Path(tmp_path)) == 5000
    estimate.check_host(config, epath.Path(tmp_path), 1000)


def test_the_figures_of_this_host(tmp_path):
    assert 10**8 < estimate.memory_here() < 10**15
    assert 0 < estimate.disk_here(epath.Path(tmp_path / "not" / "there" / "yet")) < 10**18
    assert estimate.disk_here(epath.Path("gs://bucket/run")) is None


@pytest.mark.parametrize("target", ["m2", "m3", "m5"])
def test_the_dry_run_lists_every_stage_then_the_sums(target, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(estimate, "matmul_rate", lambda dtype: 1e11)
    config = config_of(target, "demo")
    root = epath.Path(tmp_path / "run")
    launch.start(config, root, Namespace(dry_run=True, stop_after="", resume="strict"))
    assert not root.exists()
    lines = capsys.readouterr().out.splitlines()
    names = [stage.name for stage in recipe.stages(config)]
    assert [line.split()[0] for line in lines[: len(names)]] == names
    last = int(target[1:])
    wanted = ["seed/split", "sft/train", "m1/eft", "m1/train", f"m{last}/export", f"m{last}/check"]
    kinds = ("prompts", "responses", "judgments", "pairs", "reference", "train")
    wanted += [f"m{t}/{kind}" for t in range(2, last + 1) for kind in kinds]
    assert set(wanted) <= set(names)
    assert f"m{last + 1}/train" not in names
    table = {line.split()[0]: line for line in lines[: len(names)]}
    per_iteration = config.aift.num_prompts[0]
    assert re.search(rf" {per_iteration * 4} generations +about [\d,]+ s$", table["m2/responses"])
    assert re.search(rf" {per_iteration * 12} generations +about [\d,]+ s$", table["m2/judgments"])
    assert re.search(r" training +about [\d,]+ s$", table["m2/train"])
    generations, time, sizes = lines[len(names) :]
    total = sum(some for some, _ in estimate.generations(config).values())
    assert generations == f"generations {total:,}"
    assert re.match(r"time about [\d,]+ min at 35 GFLOP/s", time)
    parameters = 134_515_008
    assert f"parameters {4 * parameters:,}, training {20 * parameters:,} of {estimate.memory_here():,} here" in sizes
    assert f"workdir up to {estimate.disk_needed(config, parameters):,} of " in sizes


def test_a_stage_that_is_done_costs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(estimate, "matmul_rate", lambda dtype: 1e11)
    monkeypatch.setattr(estimate.workdir, "is_done", lambda root, stage: stage != "m2/train")
    lines = estimate.table(config_of("m2"), epath.Path(tmp_path), ["sft/train", "m2/train"], 10**9)
    assert lines[0].split() == ["sft/train", "training", "done"]
    seconds = 8 * 10**9 * estimate.training_tokens(config_of("m2"), "m2") / 35e9
    assert lines[1].endswith(f"about {seconds:,.0f} s")
    assert lines[3].startswith(f"time about {seconds / 60:,.0f} min")


def test_a_matmul_is_timed(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(estimate, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(estimate, "jnp", SimpleNamespace(ones=lambda shape, dtype: np.ones((2, 2), dtype)))
    assert estimate.matmul_rate("float32") == 2 * 2048**3  # the best of three: one second
