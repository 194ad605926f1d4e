"""The recipe on the tiny preset, and what a user sees when something is wrong."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from selfreward_jax import launch, presets, recipe, workdir
from selfreward_jax.config import Config, MeshConfig, from_config_dict
from selfreward_jax.data.records import Pair, Prompt, RankedSet, read_records, to_json
from selfreward_jax.errors import UserError
from selfreward_jax.loaded import abstract_params, params_of
from selfreward_jax.run import Held, Run, read_parts, write_records
from selfreward_jax.stages import eft, pairs, prompts, reference, seed, train_dpo, train_sft
from selfreward_jax.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]


def config(**changes: Any) -> Config:
    raw = presets.get("m3", "tiny")
    with raw.unlocked():
        for name, value in changes.items():
            group, field = name.split("__")
            raw[group][field] = value
        for group in ("mesh", "generation_mesh"):
            raw[group] = {"data": 2, "fsdp": 2, "tensor": 2}
    return from_config_dict(raw)


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """A run of the tiny preset with its seed split done; `indirect` parameters change config fields."""
    settings = config(**getattr(request, "param", {}))
    opened = launch.open_run(settings, epath.Path(tmp_path))
    with jax.set_mesh(opened.mesh):
        first = recipe.stages(settings)[0]
        first.make(opened)
        yield opened


def test_the_target_is_a_loop() -> None:
    import dataclasses

    for target, expected in (("sft", 3), ("m1", 3), ("m2", 8), ("m5", 8)):
        names = [stage.name for stage in recipe.stages(dataclasses.replace(config(), target=target))]
        assert len(names) == len(set(names))
        assert sum(name.startswith(f"{target}/") for name in names) >= expected, names
    live = config(dpo__reference="live")
    assert "m2/reference" not in [stage.name for stage in recipe.stages(live)]


VARIANTS: dict[str, dict[str, Any]] = {
    "the paper": {},
    "built": {"eft__source": "build", "eft__train_sets": 2},
    "A.3": {"eft__source": "none"},
    "A.4": {"aift__method": "positives"},
    "A.5": {"prompts__model": "current"},
    "live": {"dpo__reference": "live"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_stage_reads_what_earlier_stages_left(name: str) -> None:
    made: set[str] = set()
    for stage in recipe.stages(config(**VARIANTS[name])):
        for path in stage.inputs:
            assert path in made or path.replace("/stages/train.json", "/params") in made, (stage.name, path)
        made |= set(stage.outputs)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_training_on_own_data_reads_what_it_wrote(loss: str) -> None:
    made: set[str] = set()
    for stage in recipe.own_stages(config(), loss):
        for path in stage.inputs:
            assert path in made or path.replace("/stages/train.json", "/params") in made, (stage.name, path)
        made |= set(stage.outputs)
    assert "trained/model" in made


def test_positives_train_from_m0_with_their_weight_and_ift_only_copies() -> None:
    positive = {
        stage.name: stage for stage in recipe.stages(config(aift__method="positives", aift__positive_weight=0.5))
    }
    assert positive["m2/train"].make.keywords["files"] == [  # type: ignore[attr-defined]
        ("seed/ift.jsonl", 1.0), ("m1/eft_train.jsonl", 1.0), ("m2/positives.jsonl", 0.5),
    ]  # fmt: skip
    assert "m2/pairs" not in positive and "m2/reference" not in positive
    without = {stage.name: stage for stage in recipe.stages(config(eft__source="none"))}
    assert without["m1/train"].make.func is train_sft.copy  # type: ignore[attr-defined]


def test_no_pair_left_says_why_with_counts(run: Run) -> None:
    from selfreward_jax.data.records import Judgment, Response

    write_records(run.root / "m2" / "prompts.jsonl", [Prompt("p", "Why?", "file")])
    write_records(run.root / "m2" / "responses" / "part-0.jsonl", [
        Response("p", i, "Because.", (5, 6, 2), (-1.0, -1.0, -1.0), "stop") for i in range(2)
    ])  # fmt: skip
    write_records(run.root / "m2" / "judgments" / "part-0.jsonl", [
        Judgment("p", i, 0, "Good.", (7,), "length", None) for i in range(2)
    ])  # fmt: skip
    with pytest.raises(
        UserError, match=r"no pair is left of 1 prompts: \{'unscored': 1\}; 2 candidates have 0 judgments"
    ):
        pairs.make(run, "m2")


def test_prompts_over_the_limit_are_skipped_and_counted(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": "Name a colour."}, {"prompt": "word " * 900}, {"prompt": "Name a fruit."}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    import dataclasses

    changed = dataclasses.replace(run.config.prompts, source=str(file))
    run.config = dataclasses.replace(run.config, prompts=dataclasses.replace(changed, top_up="none"))
    facts = prompts.make(run, "m2", "m1")
    assert facts["prompts"] == 2
    assert facts["drops"] == {f"over {run.config.data.max_prompt_tokens} tokens": 1}
    second = read_records(run.root / "m2" / "prompts.jsonl", Prompt)
    assert [prompt.text for prompt in second] == ["Name a colour.", "Name a fruit."]
    with pytest.raises(UserError, match="no prompt is left"):
        prompts.make(run, "m3", "m2")  # M2 took both; slices are disjoint


def test_top_up_fills_a_short_pool_and_says_so(run: Run, tmp_path: Path) -> None:
    import dataclasses

    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "Name a colour."}\n')
    run.config = dataclasses.replace(run.config, prompts=dataclasses.replace(run.config.prompts, source=str(file)))
    facts = prompts.make(run, "m2", "m1")
    assert facts["sources"] == {"file": 1, "top-up": run.config.aift.num_prompts[0] - 1}
    first = {prompt.id for prompt in read_records(run.root / "m2" / "prompts.jsonl", Prompt)}
    prompts.make(run, "m3", "m2")
    assert not first & {prompt.id for prompt in read_records(run.root / "m3" / "prompts.jsonl", Prompt)}


@pytest.mark.parametrize("run", [{"eft__source": "build", "eft__train_sets": 2}], indirect=True)
def test_building_eft_without_a_yield_names_the_file_way(run: Run) -> None:
    run.held = Held("sft", "training", params_of(run, "m0"))  # random weights: no judgment has a score
    with pytest.raises(UserError) as caught:
        eft.make(run)
    text = str(caught.value)
    assert "no score for a reply: 2" in text
    assert "--config.eft.source=file" in text


@pytest.mark.parametrize("run", [{"data__max_length": 300}], indirect=True)
def test_judge_examples_that_are_all_too_long_are_no_silent_loss(run: Run) -> None:
    eft.make(run)
    with pytest.raises(
        UserError, match=r"m1/eft_train.jsonl: none of its 72 examples is left .*raise --config.data.max_length=300"
    ):
        train_sft.make(run, "m1", [("seed/ift.jsonl", 1.0), ("m1/eft_train.jsonl", 1.0)])


def two_pairs(run: Run) -> None:
    said = [("Why is grass green?", "Chlorophyll.", "It is."), ("Name a sea.", "The Baltic.", "Rome.")]
    from selfreward_jax.data.chat import encode_response

    rows = []
    for number, (prompt, good, bad) in enumerate(said):
        ids = [(*encode_response(run.chat, text), run.chat.end_of_turn) for text in (good, bad)]
        rows.append(Pair(f"p{number}", prompt, 0, 1, good, bad, ids[0], ids[1], "4", "1"))
    write_records(run.root / "m2" / "pairs.jsonl", rows)


def test_cached_and_live_reference_train_to_the_same_weights(run: Run) -> None:
    import dataclasses

    two_pairs(run)
    trained = {}
    checkpoint.save_params(run.root / "m1" / "params", params_of(run, "m0"))
    for kind in ("cached", "live"):
        run.held = None
        run.config = dataclasses.replace(
            run.config, dpo=dataclasses.replace(run.config.dpo, reference=kind, epochs=3)
        )
        if kind == "cached":
            reference.make(run, "m2", "m1")
        facts = train_dpo.make(run, "m2", "m1")
        assert facts["margin_before"] < 1e-4
        trained[kind] = jax.device_get(checkpoint.load_params(run.root / "m2" / "params", abstract_params(run)))
        for leftover in ("checkpoints", "metrics", "params"):
            (run.root / "m2" / leftover).rmtree()
    for a, b in zip(jax.tree.leaves(trained["cached"]), jax.tree.leaves(trained["live"]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    start = jax.device_get(params_of(run, "m0"))
    moved = [
        np.abs(a - b).max() for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(trained["live"]), strict=True)
    ]
    assert max(moved) > 1e-4


def test_a_reference_of_other_weights_stops_before_the_first_update(run: Run) -> None:
    two_pairs(run)
    checkpoint.save_params(run.root / "m1" / "params", params_of(run, "m0"))
    reference.make(run, "m2", "m1")
    path = run.root / "m2" / "reference.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["chosen"][0] -= 0.5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"before the first update the margin is 0\.5"):
        train_dpo.make(run, "m2", "m1")
    lines[0]["chosen"].pop()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"reference.jsonl:1: not the log-probs of pair p0"):
        train_dpo.make(run, "m2", "m1")


def test_ranked_sets_never_overlap_with_ift(run: Run) -> None:
    from selfreward_jax.data.records import Example

    ift = {example.prompt for example in read_records(run.root / "seed" / "ift.jsonl", Example)}
    held_out = {ranked.prompt for ranked in read_records(run.root / "seed" / "eft_eval_sets.jsonl", RankedSet)}
    rest = {example.prompt for example in read_records(run.root / "seed" / "rest.jsonl", Example)}
    assert not ift & held_out
    assert not ift & rest
    assert not rest & held_out


@pytest.mark.parametrize("run", [{"prompts__model": "current", "prompts__top_up": "none"}], indirect=True)
def test_the_model_in_training_writes_its_own_pool(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A.5: each iteration asks its own model, and its prompts are none of an earlier pool's."""
    asked: list[str] = []

    def writes(some: Run, before: str) -> Any:
        asked.append(before)
        return None, some.chat

    def answers(
        _run: Run, _model: Any, _chat: Any, label: str, number: int, *_: Any
    ) -> tuple[list[str], Counter[str]]:
        common = [f"Explain to a new colleague what step number {n} of the plan is." for n in range(3)]
        return [*common, *(f"{label} {number} {n}: tell {'and tell ' * n}a story." for n in range(8))], Counter()

    monkeypatch.setattr(prompts, "prompt_writer", writes)
    monkeypatch.setattr(prompts, "_ask", answers)
    texts = []
    for model, before in (("m2", "m1"), ("m3", "m2")):
        prompts.make(run, model, before)
        assert (run.root / model / "pool" / "round-00000.jsonl").exists()
        texts.append({prompt.text for prompt in read_records(run.root / model / "prompts.jsonl", Prompt)})
    assert asked == ["m1", "m2"]
    assert not texts[0] & texts[1]
    assert any("colleague" in text for text in texts[0]) and not any("colleague" in text for text in texts[1])


def test_new_prompts_keep_clear_of_evaluation_prompts(run: Run, tmp_path: Path) -> None:
    import dataclasses

    alpaca, bench = tmp_path / "alpaca.json", tmp_path / "bench.jsonl"
    alpaca.write_text(json.dumps([{"instruction": "Who invented the steam engine of this museum?", "output": "x"}]))
    bench.write_text(json.dumps({"question_id": 81, "turns": ["Write a blog post about Hawaii.", "Again."]}) + "\n")
    changed = dataclasses.replace(run.config.prompts, avoid=(str(alpaca), str(bench)))
    run.config = dataclasses.replace(run.config, prompts=changed)
    index = prompts._held_out(run)
    for text in ("Who invented the steam engine in this museum?", "Write a blog post on Hawaii.", "Again."):
        assert index.is_similar(text), text
    ours = [
        json.loads(line)["prompt"] for line in (ROOT / "selfreward_jax/data/seed/test.jsonl").read_text().splitlines()
    ]
    assert index.is_similar(ours[0]) and not index.is_similar("Name three seas that freeze in winter.")


@pytest.mark.parametrize("run", [{"data__ift_examples": 8, "eft__eval_sets": 2}], indirect=True)
def test_own_instructions_replace_the_best_replies_and_never_meet_a_ranked_set(run: Run, tmp_path: Path) -> None:
    import dataclasses

    ranked = read_records(run.root / "seed" / "eft_eval_sets.jsonl", RankedSet)[0]
    rows = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(9)]
    rows.append({"instruction": ranked.prompt.upper(), "input": "", "output": "?"})
    file = tmp_path / "alpaca.json"
    file.write_text(json.dumps(rows))
    run.config = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, ift=str(file)))
    facts = seed.make(run)
    from selfreward_jax.data.records import Example

    ift = read_records(run.root / "seed" / "ift.jsonl", Example)
    assert len(ift) == 8 and all(example.prompt.startswith("Say ") for example in ift)
    assert facts["rest"] == 1 and facts["drops"]["ift_prompt_of_a_ranked_set"] == 1


def test_what_only_a_late_stage_reads_is_read_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    bad = config(
        judge__template="multiple_choice", judge__model="https://host/v1?key=1", judge__endpoint_model="x",
        prompts__source=str(tmp_path / "none.jsonl"), prompts__avoid=(str(tmp_path / "empty.jsonl"),),
        data__validation=str(tmp_path), eft__file=str(tmp_path / "judge.jsonl"),
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        launch.check_inputs(bad, epath.Path(tmp_path))
    said = caught.value.args
    wanted = (
        "scores 1 to 5, not 0 to 5",
        "URL",
        "none.jsonl",
        "empty.jsonl",
        f"{tmp_path}: is a folder",
        "judge.jsonl",
    )
    assert len(said) == len(wanted), said
    assert all(any(part in line for line in said) for part in wanted), said
    launch.check_inputs(config(), epath.Path(tmp_path))


def test_a_part_that_a_kill_left_half_written_is_no_part(tmp_path: Path) -> None:
    folder = epath.Path(tmp_path / "parts")
    write_records(folder / "part-00000-of-00002.jsonl", [Prompt("a", "A?", "file")])
    write_records(folder / "part-00001-of-00002.jsonl", [Prompt("b", "B?", "file")])
    (folder / ".part-00001-of-00002.jsonl.77.tmp").write_text('{"id":"b","text":"B')
    assert [prompt.id for prompt in read_parts(folder, Prompt)] == ["a", "b"]


def test_a_data_file_that_changed_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("one")
    settings = config(data__ift=str(file))
    made: list[str] = []

    def make(_: Run) -> dict[str, Any]:
        workdir.write_text(epath.Path(tmp_path / "run/trained/examples.jsonl"), f"{len(made)}")
        made.append("again")
        return {}

    import dataclasses

    stage = dataclasses.replace(recipe.own_stages(settings, "sft")[0], make=make)

    def build() -> None:
        recipe.build([stage], settings, epath.Path(tmp_path / "run"), lambda: None)  # type: ignore[arg-type, return-value]

    build()
    build()
    assert len(made) == 1
    file.write_text("two")
    build()
    assert len(made) == 2 and "mine.jsonl changed: done again" in capsys.readouterr().out
    file.unlink()  # what is gone may have been moved: the work stays
    build()
    assert len(made) == 2


def test_a_model_folder_that_changed_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "more/tokenizer.json"):
        (folder / name).write_text("0123456789")
    monkeypatch.setattr(recipe, "_HASHED", 10)
    (folder / "model.safetensors").write_text("as large as weights")
    settings = {"model.source": str(folder), "model.tokenizer": "", "data.ift": ""}
    first = recipe.files_of(settings)
    assert list(first) == [str(folder)] and recipe.files_of(settings) == first
    (folder / "more" / "tokenizer.json").write_text("0123456780")
    second = recipe.files_of(settings)
    (folder / "model.safetensors").write_text("as large as weights are")
    assert len({*first.values(), *second.values(), *recipe.files_of(settings).values()}) == 3
    assert recipe.files_of({"model.source": "demo", "model.tokenizer": "organisation/model"}) == {}


def test_a_loop_that_cannot_go_on_still_shows_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = epath.Path(tmp_path)
    facts = {"loss": 1.5, "answers": 2, "ended": 1, "mean_tokens": 3.0, "judgments": 4, "parsed": 1}
    for stage in recipe.stages(config()):
        if stage.name == "m1/eft":
            break
        for name in stage.outputs:
            workdir.write_text(root / name, "x")
        workdir.finish(root, stage.name, [], [root / name for name in stage.outputs], 1.0, facts)

    def fails() -> Run:
        raise UserError("no model here")

    with pytest.raises(UserError, match="no model here"):
        recipe.build_loop(config(), root, fails)
    assert "| sft | 1.5000 | 25.0% |" in capsys.readouterr().out
    assert "| m1 |" not in (root / "report.md").read_text()
    (root / "report.md").unlink()
    (root / "report.md").mkdir()  # takes no text, as a full disk

    with pytest.raises(UserError, match=r"^no model here$"):
        recipe.build_loop(config(), root, fails)


def test_a_run_that_stop_after_ended_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = epath.Path(tmp_path)
    first = recipe.stages(config())[0]
    for name in first.outputs:
        workdir.write_text(root / name, "x")
    workdir.finish(root, first.name, [], [root / name for name in first.outputs], 1.0, {})
    recipe.build_loop(config(), root, lambda: pytest.fail("nothing is left to do"), first.name)
    (*_, last) = capsys.readouterr().out.splitlines()
    assert last == "stopped here by --stop_after=seed/split; the same command without it goes on"


def test_both_meshes_are_looked_at_before_either_is_refused(tmp_path: Path) -> None:
    import dataclasses

    wrong = dataclasses.replace(config(), mesh=MeshConfig(1, 3, 1), generation_mesh=MeshConfig(5, 1, 1))
    with pytest.raises(UserError) as caught:
        launch.open_run(wrong, epath.Path(tmp_path))
    assert [line.split(" does not")[0] for line in caught.value.args] == [
        "--config.mesh: mesh 1x3x1",
        "--config.generation_mesh: mesh 5x1x1",
    ]
    for name, good in (("generation_mesh", "mesh"), ("mesh", "generation_mesh")):
        one = dataclasses.replace(wrong, **{good: MeshConfig(8, 1, 1)})
        with pytest.raises(UserError, match=f"^--config.{name}: [^\n]*$"):
            launch.open_run(one, epath.Path(tmp_path))


def main(*arguments: str, workdir: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "selfreward_jax.main", f"--workdir={workdir}", *arguments]
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


BAD_DATA = {
    "missing": (None, "no such file"),
    "empty.jsonl": (b"", "empty"),
    "broken.jsonl": (b'{"message_tree_id": "a"}\n{not json\n', ":2: not JSON"),
    "unranked.jsonl.gz": (
        gzip.compress(
            json.dumps({
                "message_tree_id": "t", "prompt": {
                    "message_id": "t", "text": "Why?", "role": "prompter", "lang": "en",
                    "replies": [
                        {"message_id": f"r{i}", "text": f"So {i}.", "role": "assistant", "lang": "en", "replies": []}
                        for i in range(2)
                    ],
                },
            }).encode()
        ),
        "rank",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BAD_DATA))
def test_a_bad_data_file_is_one_line_and_nothing_is_lost(name: str, tmp_path: Path) -> None:
    content, expected = BAD_DATA[name]
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    done = main("--config=configs/m1.py:tiny", f"--config.data.oasst={file}", workdir=tmp_path / "run")
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) <= 2
    assert all(line.startswith("error: ") for line in lines), done.stderr
    assert expected in done.stderr
    assert str(file) in done.stderr


@pytest.mark.slow
def test_a_changed_config_is_refused_until_override(tmp_path: Path) -> None:
    first = main("--config=configs/sft.py:tiny", "--stop_after=seed/split", workdir=tmp_path / "run")
    assert first.returncode == 0, first.stderr
    record = workdir.record_path(epath.Path(tmp_path / "run"), "seed/split").read_text()
    again = ("--config=configs/sft.py:tiny", "--stop_after=seed/split", "--config.sft.lr=0.001")
    refused = main(*again, workdir=tmp_path / "run")
    assert refused.returncode == 2
    assert "--config.sft.lr=0.001: this run was begun with 0.003" in refused.stderr
    assert workdir.record_path(epath.Path(tmp_path / "run"), "seed/split").read_text() == record
    taken = main(*again, "--resume=override", workdir=tmp_path / "run")
    assert taken.returncode == 0, taken.stderr
    assert "[seed/split] done before" in taken.stdout


def test_records_read_back(tmp_path: Path) -> None:
    line = to_json(Prompt("a", "text with \u2028 and \n", "file"))
    (tmp_path / "x.jsonl").write_text(line + "\n")
    assert read_records(tmp_path / "x.jsonl", Prompt) == [Prompt("a", "text with \u2028 and \n", "file")]
