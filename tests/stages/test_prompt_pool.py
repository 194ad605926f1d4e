"""The pool of new prompts: what is asked, what is counted, and what a finished round may still give."""

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from etils import epath
from tokenizers.processors import TemplateProcessing

from selfreward_jax import presets
from selfreward_jax.config import from_config_dict
from selfreward_jax.data.chat import encode_prompt, encode_text, load_chat
from selfreward_jax.data.records import Example, Prompt, read_records
from selfreward_jax.run import write_records
from selfreward_jax.stages import prompts
from selfreward_jax.weights.source import open_source

SUBJECTS = (
    "How do bees find their way back home?",
    "Write a short poem about the tide at night.",
    "Which tools does a beginner in woodworking need?",
    "Explain compound interest to a ten year old.",
    "Suggest three names for a bakery by the sea.",
    "What should I pack for a week in the mountains?",
    "Turn this recipe for four into one for two people.",
    "Compare rye and wheat bread in two sentences.",
    "Give me a riddle whose answer is a shadow.",
    "Plan a quiet birthday for my grandmother.",
    "Why does bread rise when yeast is added?",
    "List the planets with more than one moon.",
)


@pytest.fixture(scope="module")
def source():
    return open_source("random:tiny")


@pytest.fixture
def run(tmp_path, source):
    """A run of the tiny preset with ten seed prompts; four new prompts an iteration, without a top-up."""
    raw = presets.get("m3", "tiny")
    raw.aift.num_prompts, raw.prompts.top_up, raw.prompts.max_rounds = (4,), "none", 3
    root = epath.Path(tmp_path)
    seeds = [Example(f"s{n}", f"Seed number {n} speaks of {'x' * n} alone.", "r", "mine") for n in range(10)]
    write_records(root / "seed" / "ift.jsonl", seeds)
    write_records(root / "seed" / "rest.jsonl", [])
    chat = load_chat(source.tokenizer, "own", source.eos_ids)
    return SimpleNamespace(config=from_config_dict(raw), root=root, source=source, chat=chat)


@pytest.fixture
def writes(monkeypatch):
    """`writes(round, ...)`: the model writes these lists of instructions, one a round, and no more; gives a log of them."""
    log = []

    def make(*rounds):
        left = list(rounds)

        def ask(*_):
            log.append(left[0])
            return list(left.pop(0)), Counter()

        monkeypatch.setattr(prompts, "prompt_writer", lambda run, before: (None, None))
        monkeypatch.setattr(prompts, "_ask", ask)
        return log

    return make


def changed(run, **groups):
    for group, fields in groups.items():
        run.config = dataclasses.replace(
            run.config, **{group: dataclasses.replace(getattr(run.config, group), **fields)}
        )


def texts(run, model):
    return [prompt.text for prompt in read_records(run.root / model / "prompts.jsonl", Prompt)]


def avoid(path, *questions):
    path.write_text("".join(json.dumps({"prompt": some}) + "\n" for some in questions))
    return {"avoid": (str(path),)}


# What is read back.


def test_a_resume_without_a_change_asks_nothing_again_and_writes_the_same_bytes(run, writes):
    log = writes(SUBJECTS[:5], SUBJECTS[3:10])
    first = prompts.make(run, "m2", "m1")
    files = {path: path.read_bytes() for path in Path(run.root).rglob("*") if path.is_file()}
    assert prompts.make(run, "m2", "m1") == first
    prompts.make(run, "m3", "m2")
    assert log == [SUBJECTS[:5], SUBJECTS[3:10]]
    assert texts(run, "m3") == [*SUBJECTS[4:8]]
    after = {path: path.read_bytes() for path in files}
    assert after == files
    facts = prompts.make(run, "m3", "m2")
    assert facts["filtered"] == {"similar": 2} and facts["written"] == 12


def test_evaluation_prompts_that_are_named_later_reach_what_the_pool_has_already(run, writes, tmp_path):
    writes(SUBJECTS[:8], ["How do bees find their way home?", *SUBJECTS[8:11]])
    prompts.make(run, "m2", "m1")
    assert texts(run, "m2") == [*SUBJECTS[:4]]
    # Near the first, which M2 has used, and near the fifth, which M3 would take.
    near = ["How do bees find the way back home?", "Suggest three names for a bakery at the sea."]
    changed(run, prompts=avoid(tmp_path / "eval.jsonl", *near))
    facts = prompts.make(run, "m3", "m2")
    assert texts(run, "m3") == [*SUBJECTS[5:8], SUBJECTS[8]]
    assert facts["filtered"]["read_back_near_evaluation"] == 2
    assert facts["filtered"]["near_evaluation"] == 1  # what is written anew is near it too
    assert texts(run, "m2") == [*SUBJECTS[:4]]  # a finished iteration stays as it is


def test_what_an_iteration_has_used_keeps_others_off_though_it_is_refused_now(run, writes, tmp_path):
    again = "Write a short poem about the tide."  # near M2's second, and not near what is avoided
    writes(SUBJECTS[:6], [again, *SUBJECTS[8:12]])
    prompts.make(run, "m2", "m1")
    near = "Please write a short poem about the tide at night in May for my old friend."
    changed(run, prompts=avoid(tmp_path / "eval.jsonl", near))
    facts = prompts.make(run, "m3", "m2")
    assert facts["filtered"] == {"read_back_near_evaluation": 1, "similar": 1}
    assert texts(run, "m3") == [*SUBJECTS[4:6], *SUBJECTS[8:10]]


def test_changed_seeds_and_limits_reach_it_too(run, writes):
    writes(SUBJECTS[:8], SUBJECTS[8:12])
    prompts.make(run, "m2", "m1")
    write_records(run.root / "seed" / "rest.jsonl", [Example("new", SUBJECTS[4], "r", "mine")])
    lengths = {text: len(encode_prompt(run.chat, text)) for text in SUBJECTS[:8]}
    *_, second, longest = sorted(set(lengths.values()))
    changed(run, data={"max_prompt_tokens": second})
    filtered = prompts.make(run, "m3", "m2")["filtered"]
    over = [text for text, length in lengths.items() if length == longest]
    assert SUBJECTS[4] not in over
    assert filtered["read_back_similar"] == 1
    assert filtered[f"read_back_over {second} tokens"] == len(over)
    assert not {SUBJECTS[4], *over} & {*texts(run, "m3")}


# What is asked, and what gives no instruction.


def completions(run, monkeypatch, *written):
    """The engine gives these (text, finish reason) completions, one a request; gives the requests it was handed."""
    asked = []

    def answer(model, how, requests, seed, phase):
        asked.extend(requests)
        for number, (text, reason) in enumerate(written):
            yield number, [[SimpleNamespace(ids=tuple(encode_text(run.chat, text)), finish_reason=reason)]], {}

    monkeypatch.setattr(prompts.engines, "run", answer)
    monkeypatch.setattr(
        prompts, "prompt_writer", lambda run, before: (SimpleNamespace(config=run.source.config), run.chat)
    )
    return asked


WRITTEN = (
    (f" {SUBJECTS[0]}\n10. {SUBJECTS[1]}\n11. {SUBJECTS[2]}\n12. Expl", "length"),
    (f" {SUBJECTS[3]}\n10. {SUBJECTS[4]}\n12. {SUBJECTS[5]}\n13. {SUBJECTS[6]}", "stop"),
    (f" {SUBJECTS[7]}\n10. Why?\n11. {SUBJECTS[0]}\n12. ", "stop"),
)


def test_every_item_that_was_written_is_taken_or_counted(run, monkeypatch):
    changed(run, prompts={"max_rounds": 1})
    completions(run, monkeypatch, *WRITTEN)
    facts = prompts.make(run, "m2", "m1")
    drops = {"cut_off": 1, "out_of_order": 2, "empty": 1, "too_short": 1, "similar": 1}
    assert facts["filtered"] == drops
    assert (facts["pool"], facts["written"]) == (6, 6 + sum(drops.values()))
    told = json.loads((run.root / "prompts" / "round-00000.json").read_text())
    assert told == {"raw": facts["written"], "drops": drops}


def test_the_original_counts_the_completions_that_it_discards(run, monkeypatch):
    changed(run, prompts={"max_rounds": 1, "normalise": "faithful"})
    completions(run, monkeypatch, *WRITTEN)
    facts = prompts.make(run, "m2", "m1")
    assert facts["filtered"]["completion_cut_off"] == 1
    items = sum(count for reason, count in facts["filtered"].items() if reason != "completion_cut_off")
    assert facts["written"] == facts["pool"] + items  # the completion is not one of the instructions


def test_requests_that_leave_no_room_are_counted(run, monkeypatch, capsys):
    long = [Example(f"s{n}", f"Number {n} says {'so ' * 40}.", "r", "mine") for n in range(9)]
    write_records(run.root / "seed" / "ift.jsonl", [*long, Example("huge", "word " * 3000, "r", "mine")])
    changed(run, prompts={"max_rounds": 1, "requests": 30})
    asked = completions(run, monkeypatch, WRITTEN[0])
    facts = prompts.make(run, "m2", "m1")
    assert len(asked) + facts["filtered"]["request_over_context"] == 30
    assert 0 < len(asked) < 30
    assert "'request_over_context': " in capsys.readouterr().out


def test_a_request_opens_with_bos_once_where_texts_do(run, monkeypatch):
    changed(run, prompts={"max_rounds": 1})
    plain = completions(run, monkeypatch, WRITTEN[0])
    prompts.make(run, "m2", "m1")
    tokenizer = copy.deepcopy(run.source.tokenizer)
    bos = tokenizer.bos_token_id
    opening = TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", bos)]
    )
    tokenizer.backend_tokenizer.post_processor = opening
    run.chat = load_chat(tokenizer, "own")
    for path in Path(run.root).rglob("round-*"):
        path.unlink()
    opened = completions(run, monkeypatch, WRITTEN[0])
    prompts.make(run, "m2", "m1")
    assert [request.ids for request in opened] == [(bos, *request.ids) for request in plain]
    assert all(request.ids.count(bos) == 1 for request in opened)
