"""Expected scores: the right place, the right digits, and the probabilities that transformers gives them."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from etils import epath
from transformers import AutoModelForCausalLM

from selfreward_jax import launch, presets
from selfreward_jax.config import from_config_dict
from selfreward_jax.data.chat import decode, encode_text
from selfreward_jax.data.records import Judgment
from selfreward_jax.evaluation import expected, judge
from selfreward_jax.judging import templates
from selfreward_jax.loaded import engine, fresh_params
from selfreward_jax.sampling.engine import Completion
from selfreward_jax.weights.export import export

ADDITIVE = templates.load("additive")
TEXTS = [
    ("A clear answer to 2 of 3 questions.\nScore: 4", "stop"),
    ("Score: 1 for relevance, and it is short.\n**Score: 0/5**", "stop"),
    ("No verdict at all.", "stop"),
    ("Good.\nScore: 3.5", "stop"),
    ("Score: 5 because it is right and kind, I", "length"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = launch.open_run(from_config_dict(presets.get("m2", "tiny")), epath.Path(tmp_path_factory.mktemp("expected")))
    with jax.set_mesh(made.mesh):
        yield made


def judgment(chat, text, finish) -> Judgment:
    ids = (*encode_text(chat, text), *((chat.end_of_turn,) if finish == "stop" else ()))
    return judge.judgments(chat, ADDITIVE, "p", 0, [Completion(ids, (), finish)])[0]


def test_the_place_is_that_of_the_digit_which_decides(run):
    found = [expected.score_place(run.chat, ADDITIVE, judgment(run.chat, *some)) for some in TEXTS]
    assert [some is not None for some in found] == [True, True, False, False, True]
    for (text, finish), some in zip(TEXTS, found, strict=True):
        if some:
            place, digits = some
            made = judgment(run.chat, text, finish)
            assert len(digits) == 6 and made.token_ids[place] == digits[int(made.score)]
            for score, token in enumerate(digits):
                ids = (*made.token_ids[:place], token, *made.token_ids[place + 1 :])
                assert judge.judgments(run.chat, ADDITIVE, "p", 0, [Completion(ids, (), finish)])[0].score == str(score)


def test_scores_of_two_digits_and_doubled_statements_have_none(run):
    assert expected.score_place(run.chat, ADDITIVE, judgment(run.chat, "Score: 4\nFinal score: 4", "stop")) is None
    wide = templates.Template("wide", ADDITIVE.text, 0, 10)
    assert expected.score_place(run.chat, wide, judgment(run.chat, "Score: 4", "stop")) is None


def test_expected_scores_are_those_of_transformers(run, tmp_path):
    made = [judgment(run.chat, *some) for some in TEXTS]
    asked = [judge.request(run.chat, ADDITIVE, "Name a colour.", f"Blue, {n}.", n, 1).ids for n in range(len(made))]
    params = fresh_params(run, "m0")
    judged = list(zip(asked, made, strict=True))
    config = run.source.config
    got = expected.with_expected(engine(run, "m0"), run.chat, ADDITIVE, judged, 8)
    assert [dataclasses.replace(one, expected=None) for one in got] == made
    export(params, config, run.chat.tokenizer, epath.Path(tmp_path / "model"), "float32", "", generation={})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for ids, one in zip(asked, got, strict=True):
        some = expected.score_place(run.chat, ADDITIVE, one)
        assert (some is None) == (one.expected is None)
        if some:
            with torch.no_grad():
                logits = model(torch.tensor([[*ids, *one.token_ids[: some[0]]]])).logits[0, -1]
            weights = np.exp(logits[list(some[1])].double().numpy())
            wanted = float(weights @ np.arange(6) / weights.sum())
            assert abs(float(one.expected) - wanted) < 1e-4
            assert judge.score_of(one) != judge.stated_score(one)
            assert decode(run.chat, one.token_ids) == one.text


def test_nothing_to_weigh_costs_nothing(run):
    plain = [((1, 2), judgment(run.chat, *TEXTS[2]))]
    assert expected.with_expected(None, run.chat, ADDITIVE, plain, 8) == [plain[0][1]]  # type: ignore[arg-type]
