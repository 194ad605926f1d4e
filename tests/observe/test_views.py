"""What is said of a run, of an artifact and of a prompt: of a small run, line by line."""

import json

import pytest
from etils import epath

from selfreward_jax import workdir
from selfreward_jax.data.records import Example, Judgment, Pair, Prompt, RankedSet, Response, to_json
from selfreward_jax.errors import UserError
from selfreward_jax.observe import artifacts, figures, views

SETTINGS = {"target": "m2", "model.source": "demo", "seed": 0, "dpo.reference": "cached"}
# Scores of the two candidates of three prompts, two judgments each; None is a judgment without a score.
SCORES = {"a": (("4", "4"), ("1", "2")), "b": (("3", "3"), ("3", "3")), "c": ((None, "2"), ("5", "0"))}


def write(path, some):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else to_json(row)) + "\n" for row in some))


def response(prompt, index):
    return Response(prompt, index, f"Answer {index} to {prompt}.", (7,) * (3 + index), (-0.5,) * (3 + index), "stop")


def judgment(prompt, index, sample, score):
    reason = "cut_off" if score is None else None
    return Judgment(prompt, index, sample, f"Fine.\nScore: {score}", (5, 6), "stop", score, reason)


@pytest.fixture
def root(tmp_path):
    """A run to M2 whose training is under way, made up."""
    root = epath.Path(tmp_path / "run")
    workdir.write_json(root / "config.json", SETTINGS)
    write(root / "seed" / "ift.jsonl", [Example("i", "Why?", "So.", "oasst")])
    write(root / "seed" / "eft_train_sets.jsonl", [])
    write(root / "seed" / "eft_eval_sets.jsonl", [RankedSet("r", "Who?", ("Me.", "You."), (1, 0))])
    prompts = [Prompt(key, f"Prompt {key}?", "self-instruct") for key in "abc"]
    write(root / "prompts" / "round-00000.jsonl", prompts)
    workdir.write_json(root / "prompts" / "round-00000.json", {"raw": 9, "drops": {"similar": 4, "short": 2}})
    write(root / "m2" / "prompts.jsonl", prompts)
    for part, keys in enumerate(("ab", "c")):
        name = f"part-{part:05d}-of-00002.jsonl"
        write(root / "m2" / "responses" / name, [response(key, index) for key in keys for index in range(2)])
        votes = [(key, i, k, SCORES[key][i][k]) for key in keys for i in range(2) for k in range(2)]
        write(root / "m2" / "judgments" / name, [judgment(*vote) for vote in votes])
    pairs = [
        Pair("a", "Prompt a?", 0, 1, "Answer 0 to a.", "Answer 1 to a.", (7, 7, 7), (7,) * 4, "4", "3/2"),
        Pair("c", "Prompt c?", 1, 0, "Answer 1 to c.", "Answer 0 to c.", (7,) * 4, (7, 7, 7), "5/2", "2"),
    ]
    write(root / "m2" / "pairs.jsonl", pairs)
    write(root / "m2" / "metrics" / "segment-00000.jsonl", ['{"step": 0, "loss": 0.75}', '{"step": 1, "loss": 0.5}'])
    for stage, facts in {
        "seed/split": {"examples": 12, "drops": {"one_ranked": 3}},
        "sft/train": {"examples": 1, "loss": 2.5},
        "sft/check": {
            "answers": 4, "ended": 3, "mean_tokens": 8.25, "own_score": None, "judgments": 6, "parsed": 0, "pairs": 5,
            "accuracy": 0.4, "low": 0.2, "high": 0.6,
        },
        "m1/train": {"examples": 2, "loss": 1.25},
        "m2/pairs": {"pairs": 2, "prompts": 3, "drops": {"equal_scores": 1}},
    }.items():  # fmt: skip
        workdir.finish(root, stage, [], [], 61.27, facts)
    workdir.begin(root, "m2/train", {}, [], [])
    return root


def texts(lines):
    return [" " * line.indent + line.text for line in lines]


def overview(root):
    return texts(views.of_run(artifacts.open_look(root)))


def section(lines, title):
    """The lines below a heading, up to the next one."""
    start = lines.index(title) + 1
    stop = next((i for i, line in enumerate(lines) if i >= start and not line.startswith(" ")), len(lines))
    return lines[start:stop]


def look_at(root, name, examples=0):
    look = artifacts.open_look(root)
    return texts(views.of_artifact(look, artifacts.choose(look, name), examples, 0)), look


def prompt_lines(root, key, scope=""):
    return texts(views.of_prompt(artifacts.open_look(root), key, scope))


def test_a_line_a_stage_says_how_far_it_is(root):
    stages = section(overview(root), "stages")
    split = {line.split()[0]: line for line in stages}
    assert list(split) == artifacts.planned(SETTINGS)
    assert len(stages) == len(split)
    assert split["seed/split"] == "  seed/split      done        12 examples            61.3 s  dropped one_ranked 3"
    assert split["m2/pairs"] == "  m2/pairs        done        2 pairs                61.3 s  dropped equal_scores 1"
    assert split["m2/train"] == "  m2/train        in progress 2 updates"
    assert split["m2/responses"] == "  m2/responses    not begun"  # its rows are there, its record is not
    workdir.begin(root, "m2/responses", {}, [], [])
    workdir.begin(root, "m2/check", {}, [], [])
    workdir.begin(root, "m2/prompts", {}, [], [])
    split = {line.split()[0]: line.split()[1:] for line in section(overview(root), "stages")}
    assert split["m2/responses"] == ["in", "progress", "6", "rows,", "2/2", "parts"]
    assert split["m2/check"] == ["in", "progress"]
    assert split["m2/prompts"] == ["in", "progress", "3", "rows"]  # of the pool


def test_every_artifact_is_summed_up_in_the_overview(root):
    lines = overview(root)
    judged = section(lines, "m2/judgments: 12 judgments in 2 of 2 parts")
    assert judged[0] == "  11 of 12 judgments gave a score (91.7%)"
    assert "  tokens: min 2  median 2  mean 2  max 2" in judged
    assert "  chosen has more tokens in 1 of 2 (50.0%)" in section(lines, "m2/pairs: 2 pairs")
    assert section(lines, "m2/metrics: 2 updates") == ["  loss 0.7500 at first, 0.5000 at last"]
    assert section(lines, "seed/eft_train_sets: 0 rows") == []
    for name in ("reference", "preferences"):  # the pairs again
        write(root / "m2" / f"{name}.jsonl", ['{"id": 1}'])
    assert overview(root)[:-1] == lines[:-1]
    assert lines[-1].startswith("for fields and examples name one of: seed/eft_eval_sets, ")


def test_models_are_said_with_what_is_known_of_them(root):
    assert section(overview(root), "models") == [
        "  sft: loss 2.5000; 0 of 6 scores read; judge accuracy 40.0% [20.0%, 60.0%] of 5 pairs; 3 of 4 answers ended;"
        " mean 8.2 tokens",
        "  m1: loss 1.2500",
    ]


def test_the_pool_says_what_was_dropped(root):
    assert section(overview(root), "prompts: 3 prompts") == [
        "  9 written in 1 rounds; dropped short 2, similar 4",
        "  source: self-instruct 3 (100.0%)",
        "  text, characters: min 9  median 9  mean 9  max 9",
    ]
    (root / "prompts" / "round-00000.json").unlink()  # a kill between the two files
    assert "  0 written in 1 rounds; dropped none" in overview(root)


def test_scores_of_judge_data_before_and_after_thinning(root):
    facts = {
        "examples": 3, "sets": {"accepted": 2, "no score for a reply": 5},
        "scores_judged": {"2": 4, "10": 6, "none: cut_off": 7}, "scores_before": {"2": 1, "10": 4}, "scores": {"2": 1, "10": 2},
    }  # fmt: skip
    workdir.finish(root, "m1/eft", [], [], 1.0, facts)
    lines = overview(root)
    assert [line.split() for line in section(lines, "judge data of m1/eft")] == [
        ["score", "judgments", "accepted", "kept"],
        ["2", "4", "1", "1"],
        ["10", "6", "4", "2"],
        ["none:", "cut_off", "7", "0", "0"],
    ]
    assert next(line for line in lines if line.startswith("  m1/eft ")).endswith("dropped no score for a reply 5")
    workdir.finish(root, "m1/eft", [], [], 1.0, {"examples": 3, "scores": {"10": 1, "2": 2}})
    assert [line.split()[:2] for line in section(overview(root), "judge data of m1/eft")] == [
        ["score"], ["2", "2"], ["10", "1"],
    ]  # fmt: skip


def test_a_run_that_has_only_begun(tmp_path):
    root = epath.Path(tmp_path)
    workdir.write_json(root / "config.json", SETTINGS)
    lines = overview(root)
    assert len(section(lines, "stages")) == len(artifacts.planned(SETTINGS))
    assert all(line.endswith("not begun") for line in section(lines, "stages"))
    assert lines[-1] == "for fields and examples name one of: none yet"


def test_a_damaged_part_is_one_line_and_the_rest_is_shown(root):
    path = root / "m2" / "prompts.jsonl"
    path.write_text(path.read_text() + '{"id":"x","text":"half')
    look = artifacts.open_look(root)
    for _ in range(2):
        assert "m2/judgments: 12 judgments in 2 of 2 parts" in texts(views.of_run(look))
    (line,) = views.damaged(look)  # said once, however often it was met
    assert line.text.startswith(f"problem: {path}:4: not JSON")
    assert look_at(root, "m2/prompts")[0][0] == "m2/prompts: 3 prompts"
    lines, _ = look_at(root, "m2/judgments/part-00001-of-00002.jsonl")
    assert lines[0] == "m2/judgments: 4 judgments in 1 of 2 parts"


def test_rows_of_other_versions_are_shown(root):
    path = root / "m2" / "judgments" / "part-00000-of-00002.jsonl"
    rows = [json.loads(line) | {"new": {"a": 1}} for line in path.read_text().splitlines()]
    write(path, [json.dumps({name: row[name] for name in row if name not in ("reason", "expected")}) for row in rows])
    lines, look = look_at(root, "m2/judgments", examples=20)
    assert look.problems == []
    assert "  11 of 12 judgments gave a score (91.7%)" in lines
    fields = section(lines, "fields")
    assert "  new (absent 4): items min 1  median 1  mean 1  max 1" in fields
    assert "  reason (absent 8, null 3): characters min 7  median 7  mean 7  max 7" in fields
    assert "  expected (absent 8, null 4)" in fields


ODD = ('{"id": [1], "source": {"a": 2}, "text": null}', "{}", '{"text": 5, "source": 1e999}')


@pytest.mark.parametrize("odd", ODD)
def test_values_of_a_wrong_type_stop_nothing(root, odd):
    for name in ("m2/prompts", "m2/pairs", "seed/ift", "seed/eft_eval_sets", "m2/metrics/segment-00001"):
        path = root / f"{name}.jsonl"
        path.write_text((path.read_text() if path.exists() else "") + odd + "\n")
    for folder in ("responses", "judgments"):
        write(root / "m2" / folder / "part-00001-of-00002.jsonl", [odd])
    look = artifacts.open_look(root)
    views.of_run(look)
    for artifact in look.artifacts.values():
        views.of_artifact(look, artifact, 99, 0)
    views.of_prompt(look, "a", "")
    assert look.problems == []


def test_fields_have_counts_or_lengths(root):
    lines, _ = look_at(root, "m2/responses")
    assert section(lines, "fields") == [
        "  prompt_id: a 2, b 2, c 2",
        "  index: 0 3, 1 3",
        "  text: characters min 14  median 14  mean 14  max 14",
        "  token_ids: items min 3  median 3.5  mean 3.5  max 4  |█      █|",
        "  logprobs: items min 3  median 3.5  mean 3.5  max 4  |█      █|",
        "  finish_reason: stop 6",
    ]
    assert lines[-1].startswith("  finish_reason")  # no examples were asked for
    lines, _ = look_at(root, "m2/metrics")
    assert "  loss: values min 0.5  median 0.625  mean 0.625  max 0.75  |█      █|" in lines
    lines, _ = look_at(root, "seed/eft_train_sets", examples=3)
    assert lines == ["seed/eft_train_sets: 0 rows"]


def test_examples_are_whole(root):
    long = "A line.\n" + "word " * 400
    write(root / "m2" / "pairs.jsonl", [Pair("p", "Why?", 0, 1, long, "No.", tuple(range(99)), (3,), "7/2", None)])
    lines, _ = look_at(root, "m2/pairs", examples=5)
    at = lines.index("example: m2/pairs p")
    assert lines[at + 1 :] == [
        "  prompt_id: p; chosen_index: 0; rejected_index: 1; chosen_ids: 99 items, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …;"
        " rejected_ids: 1 items, [3]; chosen_score: 7/2; rejected_score: None",
        "  prompt (4 characters)", "    Why?",
        "  chosen (2008 characters)", f"    {long}",
        "  rejected (3 characters)", "    No.",
        "--id=ID shows a prompt with all that belongs to it",
    ]  # fmt: skip
    lines, _ = look_at(root, "seed/eft_eval_sets", examples=1)
    at = lines.index("example: seed/eft_eval_sets r")
    assert lines[at + 1 : -1] == [
        "  id: r; ranks: 2 items, [1, 0]", "  prompt (4 characters)", "    Who?",
        "  replies 0 (3 characters)", "    Me.", "  replies 1 (4 characters)", "    You.",
    ]  # fmt: skip


def test_a_prompt_with_all_that_belongs_to_it(root):
    write(root / "m2" / "positives.jsonl", [Example("a/0", "Prompt a?", "Answer 0 to a.", "positive of m2")])
    write(root / "seed" / "rest.jsonl", [Example(key, "Another.", "Yes.", "oasst") for key in ("a/b", "ab")])
    assert prompt_lines(root, "a") == [
        "pool",
        "  prompts", "  id: a; source: self-instruct", "  text (9 characters)", "    Prompt a?",
        "m2",
        "  m2/prompts", "  id: a; source: self-instruct", "  text (9 characters)", "    Prompt a?",
        "  m2/positives", "  id: a/0; source: positive of m2", "  prompt (9 characters)", "    Prompt a?",
        "  response (14 characters)", "    Answer 0 to a.",
        "  candidate 0 (chosen): mean 4 of 2 scores in 2 judgments; stop, 3 tokens", "    Answer 0 to a.",
        "    judgment 0: score 4", "      Fine.\nScore: 4", "    judgment 1: score 4", "      Fine.\nScore: 4",
        "  candidate 1 (rejected): mean 1.5 of 2 scores in 2 judgments; stop, 4 tokens", "    Answer 1 to a.",
        "    judgment 0: score 1", "      Fine.\nScore: 1", "    judgment 1: score 2", "      Fine.\nScore: 2",
        "  pair: chosen 0 (score 4), rejected 1 (score 3/2)",
    ]  # fmt: skip
    lines = prompt_lines(root, "c", "m2/judgments")
    assert "pool" not in lines
    assert "  candidate 0 (rejected): mean 2 of 1 scores in 2 judgments; stop, 3 tokens" in lines
    assert "    judgment 0: no score: cut_off" in lines


def test_why_a_prompt_has_no_pair(root):
    assert prompt_lines(root, "b")[-1] == "  no pair: equal_scores"
    write(root / "m2" / "pairs.jsonl", [])
    said = "  no pair: left out after the choice; m2/pairs dropped equal_scores 1"
    assert prompt_lines(root, "a")[-1] == said
    workdir.write_json(root / "config.json", SETTINGS | {"aift.min_judgments": 2, "aift.length_control": [0.0]})
    assert prompt_lines(root, "c")[-1] == "  no pair: unscored"  # candidate 0 has one score
    workdir.record_path(root, "m2/pairs").unlink()
    assert prompt_lines(root, "b")[-1] == "  no pair: m2/pairs is not done"


def test_expected_scores_count_where_they_are_there(root):
    rows = [json.loads(to_json(judgment("a", i, k, SCORES["a"][i][k]))) for i in range(2) for k in range(2)]
    for row, expected in zip(rows, ("3.5", "4.25", "1.5", None), strict=True):
        row["expected"] = expected
    write(root / "m2" / "judgments" / "part-00000-of-00002.jsonl", map(json.dumps, rows))
    lines = prompt_lines(root, "a")
    assert "  candidate 0 (chosen): mean 3.875 of 2 scores in 2 judgments; stop, 3 tokens" in lines
    assert "    judgment 0: score 1, expected 1.5" in lines
    assert "  candidate 1 (rejected): mean 1.75 of 2 scores in 2 judgments; stop, 4 tokens" in lines


def test_judged_replies_of_a_check_come_with_the_ranked_set(root):
    folder = root / "m1" / "check" / "held-out"
    write(folder / "part-00000-of-00001.jsonl", [judgment("r", 1, 0, "4"), judgment("r", 0, 0, "2")])
    lines = prompt_lines(root, "r", "m1/check/held-out")
    assert "  replies 1 (4 characters)" in lines
    assert lines[lines.index("m1/check") + 1 :] == [
        "  candidate 0: mean 2 of 1 scores in 1 judgments", "    judgment 0: score 2", "      Fine.\nScore: 2",
        "  candidate 1: mean 4 of 1 scores in 1 judgments", "    judgment 0: score 4", "      Fine.\nScore: 4",
    ]  # fmt: skip
    assert "  ties: equal means for 0 of 1 couples" in "\n".join(overview(root))


@pytest.mark.parametrize(("key", "scope", "where"), [("zz", "", "{root}"), ("a", "sft/check/own", "sft/check/own")])
def test_an_id_that_no_row_has_is_one_line(root, key, scope, where):
    with pytest.raises(UserError) as caught:
        prompt_lines(root, key, scope)
    assert caught.value.args == (f"--id={key}: no row of {where.format(root=root)} has it",)


HOSTILE = "[bold]x[/bold] [link=http://a]b[/link] :smile: \x1b[31mr\x1b[0m\x1b]0;\x07\r\b\x9b2J\u202eabc\ud800 [/]"
HARMLESS = (
    r"[bold]x[/bold] [link=http://a]b[/link] :smile: \x1b[31mr\x1b[0m\x1b]0;\x07\r\x08\x9b2J\u202eabc\ud800 [/]"
)


def test_texts_of_models_are_harmless_and_no_markup_when_piped(root, capsys):
    write(root / "m2" / "prompts.jsonl", [json.dumps({"id": HOSTILE, "text": f"{HOSTILE}\nnext", "source": HOSTILE})])
    look = artifacts.open_look(root)
    figures.show(views.of_run(look))
    figures.show(views.of_artifact(look, look.artifacts["m2/prompts"], 3, 0))
    figures.show(views.of_prompt(look, HOSTILE, ""))
    out = capsys.readouterr().out
    assert out.count(f"    {HARMLESS}\n    next\n") == 2
    assert not set(out) & {chr(code) for code in (*range(10), *range(11, 32), *range(127, 160), 0x202E)}
