"""The seed stage: which prompts go where, whatever the sources; no prompt in two files; what is left out is counted."""

import json
from types import SimpleNamespace

import datasets
import pytest
from etils import epath

from selfreward_jax import launch, presets, workdir
from selfreward_jax.config import from_config_dict
from selfreward_jax.errors import UserError
from selfreward_jax.stages import seed

FILES = ("ift", "eft_train_sets", "eft_eval_sets", "rest")


def split_of(folder, preset="tiny", target="m1", **groups):
    """What the stage writes under `folder`, file by file, and the facts of its record."""
    raw = presets.get(target, preset)
    raw.data.oasst = "seed"
    for group, fields in groups.items():
        for field, value in fields.items():
            raw[group][field] = value
    facts = seed.make(SimpleNamespace(config=from_config_dict(raw), root=epath.Path(folder)))
    return {name: (folder / "seed" / f"{name}.jsonl").read_text() for name in FILES}, facts


def prompts(text):
    return [" ".join(json.loads(line)["prompt"].split()).casefold() for line in text.splitlines()]


def no_prompt_in_two(files):
    every = [prompt for text in files.values() for prompt in sorted(set(prompts(text)))]
    return len(every) == len(set(every))


def write(path, *questions):
    path.write_text("".join(json.dumps({"prompt": some, "response": "So."}) + "\n" for some in questions))
    return str(path)


# IFT-only is compared with the loop that builds its judge data.


@pytest.mark.parametrize("train_sets", [-1, 20])
@pytest.mark.parametrize("preset", ["llama2_70b", "tiny"])
def test_ift_only_has_the_very_data_of_the_loop_that_builds_eft(tmp_path, preset, train_sets):
    data, sizes = {"ift_examples": 40}, {"train_sets": train_sets, "eval_sets": 10}
    built, _ = split_of(tmp_path / "a", preset, data=data, eft={"source": "build", **sizes})
    without, _ = split_of(tmp_path / "b", preset, data=data, eft={"source": "none", **sizes})
    assert without == built
    assert len(prompts(built["eft_train_sets"])) >= 20
    assert no_prompt_in_two(built)


def test_judge_examples_from_a_file_set_no_ranked_set_aside(tmp_path):
    files, facts = split_of(tmp_path, data={"ift_examples": 40}, eft={"train_sets": -1})
    assert files["eft_train_sets"] == ""
    assert facts["rest"] == 162 - 40 - 2


def test_the_paper_preset_builds_eft_from_all_that_is_left_beside_ift(tmp_path):
    _, facts = split_of(tmp_path, "llama2_70b", data={"ift_examples": 100}, eft={"eval_sets": 12})
    assert (facts["ift"], facts["eft_eval_sets"]) == (100, 12)
    assert facts["eft_train_sets"] + facts["rest"] == 162 - 100 - 12
    assert facts["eft_train_sets"] > 20


# No prompt in two files.

FLAMINGOS = "Why are flamingos pink?"  # of a held-out judge example that is packaged


def test_a_held_out_judge_question_is_in_no_other_file(tmp_path):
    mine = write(tmp_path / "mine.jsonl", "Say one.", f" {FLAMINGOS.upper()}", "Say two.")
    files, facts = split_of(tmp_path, data={"ift": mine, "ift_examples": -1})
    assert FLAMINGOS.casefold() in prompts(files["eft_eval_sets"])
    assert sorted(prompts(files["ift"])) == ["say one.", "say two."]
    assert no_prompt_in_two(files)
    assert facts["drops"]["prompt_of_held_out_judge_examples"] == 1


def conversation(key, question):
    def message(name, text, role, **more):
        return {"message_id": name, "text": text, "role": role, "lang": "en", **more}

    replies = [message(f"{key}-{n}", f"Reply {n}.", "assistant", rank=n, replies=[]) for n in range(2)]
    return {"message_tree_id": key, "prompt": message(key, question, "prompter", replies=replies)}


@pytest.mark.parametrize("source", ["file", "build"])
def test_a_held_out_judge_question_is_no_ranked_set_either(tmp_path, source):
    trees = tmp_path / "trees.jsonl"
    trees.write_text("".join(
        json.dumps(conversation(f"t{n}", question)) + "\n"
        for n, question in enumerate([FLAMINGOS, *(f"Question {n}?" for n in range(5))])
    ))  # fmt: skip
    data, eft = {"oasst": str(trees), "ift_examples": 1}, {"source": source, "train_sets": -1, "eval_sets": 2}
    files, facts = split_of(tmp_path, data=data, eft=eft)
    assert prompts(files["eft_eval_sets"]).count(FLAMINGOS.casefold()) == 1
    assert facts["eft_eval_sets"] == 2 + 8
    assert no_prompt_in_two(files)
    assert facts["drops"] == {"prompt_of_held_out_judge_examples": 1}


def test_a_question_that_own_data_repeat_is_used_once_and_counted(tmp_path):
    mine = write(tmp_path / "mine.jsonl", "Say one.", "Say two.", "say  ONE.", "Say three.", "Say one.")
    files, facts = split_of(tmp_path, data={"ift": mine, "ift_examples": 2})
    assert sorted(prompts(files["ift"]) + prompts(files["rest"])) == ["say one.", "say three.", "say two."]
    assert facts["drops"]["ift_duplicate_prompt"] == 2


# What a later stage would miss is said here.


def test_no_set_left_to_build_eft_from_is_said_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError) as caught:
        split_of(tmp_path, eft={"source": "build", "train_sets": -1, "eval_sets": 112}, data={"ift_examples": 40})
    (line,) = caught.value.args
    assert line.startswith("--config.eft.source=build: no ranked set is left beside 112 for evaluation and 40 ")


def test_fewer_instructions_than_a_request_takes_are_said_before_anything_is_trained(tmp_path):
    mine = write(tmp_path / "mine.jsonl", *(f"Say {n}." for n in range(7)))
    data = {"ift": mine, "ift_examples": -1}
    with pytest.raises(UserError) as caught:
        split_of(tmp_path, target="m2", data=data)
    (line,) = caught.value.args
    assert "7 examples are left for IFT, at least 8 are needed (prompts.seed_demonstrations and " in line
    split_of(tmp_path, target="m1", data=data)
    split_of(tmp_path, target="m2", data=data, prompts={"generated_demonstrations": 1})
    split_of(tmp_path, target="m2", data=data, prompts={"source": "some.jsonl"})


def test_bad_files_of_seed_data_are_said_at_start_with_the_others(tmp_path):
    broken, odd = tmp_path / "trees.jsonl", tmp_path / "odd.json"
    broken.write_text('{"prompt": 3}\n{not json\n')
    odd.write_text('[{"question": "Why?"}]')
    raw = presets.get("m3", "tiny")
    raw.data.oasst, raw.data.ift, raw.data.validation = str(broken), str(odd), str(tmp_path / "none.jsonl")
    with pytest.raises(UserError) as caught:
        launch.check_inputs(from_config_dict(raw), epath.Path(tmp_path))
    said = "\n".join(caught.value.args)
    for part in (f"{broken}:2: not JSON", f"{odd}:1: no known layout", "none.jsonl: no such file"):
        assert part in said
    raw.data.oasst, raw.data.ift, raw.data.validation = "gone.jsonl", str(tmp_path / "gone.parquet"), ""
    with pytest.raises(UserError) as caught:
        launch.check_inputs(from_config_dict(raw), epath.Path(tmp_path))
    assert caught.value.args == ("gone.jsonl: no such file", f"{tmp_path}/gone.parquet: no such file")


def test_the_start_asks_no_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    raw = presets.get("m3", "llama2_70b")
    raw.data.ift = "org/name:validation"
    launch.check_inputs(from_config_dict(raw), epath.Path(tmp_path))


def test_a_run_goes_on_without_the_files_that_its_split_came_from(tmp_path):
    root, mine = epath.Path(tmp_path / "run"), tmp_path / "mine.jsonl"
    raw = presets.get("m3", "tiny")
    raw.data.ift = str(mine)
    with pytest.raises(UserError, match=r"mine\.jsonl: no such file"):
        launch.check_inputs(from_config_dict(raw), root)
    workdir.finish(root, "seed/split", [], [], 0.0, {})
    launch.check_inputs(from_config_dict(raw), root)
