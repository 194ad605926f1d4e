"""The filters of Self-Instruct: each reason, and a novelty verdict equal to rouge_score's."""

import itertools
import random
import re
import string
import time
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from selfreward_jax.self_instruct import filters
from selfreward_jax.self_instruct.filters import RougeIndex, chat, faithful, filter_batch, reason_against

FAST = settings(deadline=None, max_examples=100, database=None)
SCORER = RougeScorer(["rougeL"], use_stemmer=False)


def rouge(a, b):
    return SCORER.score(a, b)["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("Name three trees", "too_short"),
        ("Name three tall trees", None),
        ("word " * 150, None),
        ("word " * 151, "too_long"),
        ("Describe the picture to me", "keyword"),
        ("Summarise the Plot of Hamlet", "keyword"),
        ("Explain how I go to work", "keyword"),
        ("Explain how I go\nto work", "keyword"),
        ("Write a roadmap for my team", None),
        ("Describe a profile of me", None),
        ("Where did they all go today", None),
        ("Write a program that sorts lists", "write_a_program"),
        ("write a Program for my wedding", "write_a_program"),
        ("Write a\nprogram for my wedding", "write_a_program"),
        ("Please write a program for me", None),
        ("(Optional) name three tall trees", "punctuation"),
        ("- Name three tall trees", "punctuation"),
        ("Éric asks for a recipe", "non_ascii"),
        ("你好 世界 朋友 们 好", "non_ascii"),
        ("¿Name three tall trees?", "non_ascii"),
        ("7 ways to wash a car", None),
        # The first of the reasons counts.
        ("(an image)", "too_short"),
        ("Write a program about maps", "keyword"),
        ("(draw me a sheep)", "keyword"),
    ],
)
def test_each_reason(text, reason):
    assert reason_against(text) == reason
    assert reason_against(chat(text)) == reason_against(faithful(text)) == reason
    assert reason is None or reason in filters.REASONS


def original(text):
    """The order of steps in the original, written down from its description."""
    text = re.sub(r"\s+", " ", text).strip().capitalize()
    words = len(text.split())
    if text == "":
        return text, "empty"
    if words <= 3:
        return text, "too_short"
    if words > 150:
        return text, "too_long"
    if any(re.search(rf"\b({word})\b", text, re.IGNORECASE) for word in filters.KEYWORDS):
        return text, "keyword"
    if text.startswith("Write a program"):
        return text, "write_a_program"
    if text[0] in string.punctuation:
        return text, "punctuation"
    return text, None if text[0].isascii() else "non_ascii"


WORDS = [
    "write",
    "Write",
    "a",
    "program",
    "go",
    "to",
    "Plot",
    "maps",
    "map",
    "DNA",
    "é",
    "ß",
    "(",
    "-",
    "x",
    "\n",
    "\x1f",
]


@FAST
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=8).map(" ".join))
def test_faithful_is_the_original(text):
    assert (faithful(text), reason_against(faithful(text))) == original(text)


def test_the_two_normalisations():
    text = "  DNA works\r\nin  Python \n to Bob "
    assert faithful(text) == "Dna works in python to bob"
    assert chat(text) == "DNA works\nin  Python \n to Bob"


def test_a_batch_is_compared_with_itself():
    index = RougeIndex(texts=["Name three tall trees of Europe"])
    candidates = [
        "Name three tall trees of Asia!",
        "What is the Capital of Peru?",
        "what is the capital of PERU",
        "too short",
        "Show me an image of Peru",
    ]
    accepted, drops = filter_batch(candidates, index)
    assert accepted == ["What is the Capital of Peru?"] and drops == {
        "similar": 2,
        "too_short": 1,
        "keyword": 1,
    }
    assert len(index) == 2
    assert filter_batch(["What is the capital of Peru, please?"], index)[1] == {"similar": 1}
    assert filter_batch(["where DO all planes land"], index, faithful)[0] == ["Where do all planes land"]


def test_a_prompt_near_an_evaluation_prompt_is_dropped():
    index = RougeIndex(texts=["Name three tall trees of Europe"])
    held_out = RougeIndex(texts=["What is the capital of Peru?", "Name three tall trees of Asia"])
    candidates = [
        "What is the capital of Chile, Peru?",
        "Name three tall trees of Africa",  # near both: the evaluation counts
        "Name three small trees of Europe",
        "Peru?",  # the cheap rules come first
        "How many people live in Lima?",
        "How many people live in Lima now?",
    ]
    accepted, drops = filter_batch(candidates, index, chat, held_out)
    assert accepted == ["How many people live in Lima?"]
    assert drops == {"near_evaluation": 2, "similar": 2, "too_short": 1}
    assert set(drops) <= set(filters.REASONS)
    assert len(held_out) == 2  # what is accepted is no evaluation prompt
    accepted, drops = filter_batch(candidates, RougeIndex(), held_out=None)
    assert "near_evaluation" not in drops and accepted[0] == candidates[0]


def test_the_evaluation_threshold_is_that_of_its_index():
    text, near = "Name three tall trees of Asia", "Name three tall trees of Africa"
    assert filter_batch([near], RougeIndex(), chat, RougeIndex(0.9, [text]))[0] == [near]
    assert filter_batch([near], RougeIndex(), chat, RougeIndex(0.7, [text]))[1] == {"near_evaluation": 1}


def test_the_threshold_itself_is_near_enough_only_above():
    text = "alpha beta gamma delta epsilon zeta eta theta iota kappa"
    at_border, above = text.replace("theta iota kappa", "un deux trois"), text.replace("iota kappa", "un deux")
    assert rouge(text, at_border) == pytest.approx(0.7, abs=1e-12)
    for candidate in (at_border, above):
        verdict = rouge(text, candidate) > 0.7
        assert (
            filter_batch([candidate], RougeIndex(), chat, RougeIndex(texts=[text]))[1]["near_evaluation"] == verdict
        )


TOKENS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "F", "1", "é", "-", "x-y"]), max_size=24).map(" ".join)


@FAST
@given(
    st.lists(TOKENS | st.text(max_size=12), max_size=8),
    TOKENS,
    st.sampled_from([0.0, 0.3, 0.5, 2 / 3, 0.7, 1.0]),
)
def test_the_verdict_is_rouge_scores(pool, text, threshold):
    index = RougeIndex(threshold, pool)
    assert index.is_similar(text) == (max([rouge(text, other) for other in pool], default=0) > threshold)


@FAST
@given(TOKENS, TOKENS)
def test_the_measure_is_rouge_scores_to_the_bit(a, b):
    ids = {token: number for number, token in enumerate(set(filters._tokens(f"{a} {b}")))}
    first, second = ([ids[token] for token in filters._tokens(text)] for text in (a, b))
    places: dict[int, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    lcs = filters._lcs_length(places, len(first), second)
    assert filters._f_measure(lcs, len(first), len(second)) == rouge(a, b)


def test_the_threshold_itself_is_decided_by_the_same_rounding():
    # 2 * LCS / (n + m) is 7/10 in all of these; in floats some are a bit above 0.7.
    verdicts = set()
    for n in range(4, 60):
        for m in range(n, 60):
            if (n + m) % 20 == 0 and (lcs := 7 * (n + m) // 20) <= n:
                a = " ".join(f"w{i}" for i in range(n))
                b = " ".join(f"w{i}" if i < lcs else f"v{i}" for i in range(m))
                verdicts.add(RougeIndex(0.7, [b]).is_similar(a))
                assert RougeIndex(0.7, [b]).is_similar(a) == (rouge(a, b) > 0.7)
    assert verdicts == {True, False}


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.9])
def test_a_large_pool_against_rouge_score(threshold):
    rng = random.Random(0)
    words = [f"w{n}" for n in range(40)] + ["the"] * 10 + ["of"] * 5  # frequent ones, and repeats in a text
    pool = [" ".join(rng.choices(words, k=rng.randint(1, 25))) for _ in range(150)]
    index = RougeIndex(threshold, pool)
    verdicts = set()
    for text in rng.sample(pool, 20):
        tokens = [rng.choice(words) if rng.random() < 0.35 else token for token in text.split()]
        del tokens[: rng.randint(0, len(tokens) // 4)]
        changed = " ".join(tokens)
        verdicts.add(index.is_similar(changed))
        assert index.is_similar(changed) == any(rouge(changed, other) > threshold for other in pool)
    assert True in verdicts and (False in verdicts or threshold < 0.7)


def test_entries_of_every_length_are_found():
    # Prefixes of one text: F of two of them is 2 min(a, b) / (a + b), so the lengths decide alone.
    words = [f"w{n}" for n in range(40)]
    for a in range(1, 41):
        for b in range(1, 41):
            query, entry = " ".join(words[:a]), " ".join(words[:b])
            assert RougeIndex(texts=[entry]).is_similar(query) == (rouge(query, entry) > 0.7)


def test_other_scripts_are_invisible_to_the_measure():
    index = RougeIndex(texts=["翻译 这 句 话"])
    assert not index.is_similar("翻译 这 句 话") and rouge("翻译 这 句 话", "翻译 这 句 话") == 0


class Read(array):
    """A posting list that counts what is read of it."""

    total = 0

    def __getitem__(self, place):
        got = super().__getitem__(place)
        Read.total += len(got) if isinstance(place, slice) else 0
        return got


def test_frequent_words_are_not_read(monkeypatch):
    rng = random.Random(0)
    names = itertools.count()

    def text():
        words = ["the", "of", "a", "to", *(f"v{rng.randrange(300)}" for _ in range(4))]
        words += [f"w{next(names)}" for _ in range(6)]
        return " ".join(rng.sample(words, len(words)))

    index = RougeIndex(texts=[text() for _ in range(3_000)])
    index._postings = {key: Read("q", entries) for key, entries in index._postings.items()}
    monkeypatch.setattr(filters, "_lcs_length", lambda *_: pytest.fail("no two share enough rare words"))
    Read.total = 0
    for _ in range(20):
        assert not index.is_similar(text())
    # The four frequent words are in all 3,000 entries, four others in some 40 each, the rest in none.
    assert 20 < Read.total / 20 < 200


def test_many_instructions_stay_cheap():
    rng = random.Random(1)
    words = [f"w{int(rng.paretovariate(0.6)) % 3000}" for _ in range(20_000)]
    start = time.process_time()
    index = RougeIndex(texts=(" ".join(rng.sample(words, 15)) for _ in range(5_000)))
    for _ in range(100):
        index.is_similar(" ".join(rng.sample(words, 15)))
    assert time.process_time() - start < 5.0  # a tenth of a second; rouge_score takes minutes
