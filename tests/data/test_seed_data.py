"""Measures the packaged seed data: enough of it, even, and every text its own."""

import itertools
import json
import random
import re
from collections import Counter

import pytest
from rouge_score import rouge_scorer

from selfreward_jax.data import oasst
from selfreward_jax.data.seeds import held_out_sets, judge_rows, packaged, prompt_texts
from selfreward_jax.self_instruct.filters import RougeIndex
from selfreward_jax.weights import fetch

CATEGORIES = {
    *("open_qa", "closed_qa", "brainstorming", "classification", "creative_writing", "extraction"),
    *("rewriting", "summarization", "coding", "math_reasoning", "advice", "explanation"),
}


def rows(name):
    return [json.loads(line) for line in packaged(name).read_text().splitlines()]


TREES = rows("trees.jsonl")
PROMPTS = [tree["prompt"]["text"] for tree in TREES]
REPLIES = [reply["text"] for tree in TREES for reply in tree["prompt"]["replies"]]
JUDGE = judge_rows("seed", 0, 5)
JUDGED = list(dict.fromkeys(row["instruction"] for row in JUDGE))
JUSTIFICATIONS = [row["justification"] for row in JUDGE]
VALIDATION = [text for _, text in prompt_texts("", "validation.jsonl")]
TEST = [text for _, text in prompt_texts("", "test.jsonl")]


def close(texts, above, among=()):
    """The texts that have a ROUGE-L F above a threshold with one of `among` or one before them."""
    index, found = RougeIndex(above, among), []
    for text in texts:
        if index.is_similar(text):
            found.append(text)
        index.add(text)
    return found


def most_tokens(text):
    """An estimate of the demo tokenizer's count that errs upwards, for hosts without it.

    A token for every four letters begun of each word, for each digit and the space before it, each line end, and each
    byte of every other sign. `test_the_demo_tokenizer_agrees` holds it to the true counts where the demo model is.
    """
    pieces = re.findall(r"[^\W\d_]+|\d|[^\w\s]|_|\n|\s(?=\d)", text)
    return sum(-(-len(piece) // 4) if piece.isalpha() else len(piece.encode()) for piece in pieces)


def share_under(limit, texts, count=most_tokens):
    return sum(count(text) < limit for text in texts) / len(texts)


def test_prompts_are_many_and_cover_the_usual_categories():
    assert len(PROMPTS) >= 150
    kinds = Counter(tree["category"] for tree in TREES)
    assert set(kinds) == CATEGORIES
    assert min(kinds.values()) >= 10
    for name in ("validation.jsonl", "test.jsonl"):
        kinds = Counter(row["category"] for row in rows(name))
        assert set(kinds) == CATEGORIES
        assert min(kinds.values()) >= 4


def test_all_of_it_loads_and_many_prompts_have_three_ranked_replies():
    seed = oasst.load(packaged("trees.jsonl"))
    assert len(seed.examples) == len(PROMPTS)
    assert sum(len(ranked.replies) >= 3 for ranked in seed.sets) >= 80
    assert set(seed.drops) <= {"one_ranked"}
    for ranked in seed.sets:
        assert sorted(ranked.ranks) == list(range(len(ranked.ranks))), "every reply has a rank of its own"


def test_replies_to_one_prompt_are_different_texts_and_the_longest_is_not_the_best_by_habit():
    seed = oasst.load(packaged("trees.jsonl"))
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    alike = 0
    longest = Counter()
    sets = [ranked for ranked in seed.sets if len(ranked.replies) >= 3]
    for ranked in sets:
        for one, other in itertools.combinations(ranked.replies, 2):
            score = scorer.score(one, other)["rougeL"].fmeasure
            assert score < 0.95, (one, other)
            alike += score > 0.7
        longest[ranked.ranks[max(range(len(ranked.replies)), key=lambda i: len(ranked.replies[i]))]] += 1
    assert alike <= 0.05 * len(sets)
    assert longest[0] / len(sets) < 0.5


def test_no_two_prompts_are_alike():
    assert close(PROMPTS, 0.5) == []
    assert close(JUDGED, 0.5) == []
    assert close(JUDGED, 0.7, PROMPTS) == []


def test_judge_examples_are_many_and_even():
    train, held_out = ([row for row in JUDGE if row["split"] == split] for split in ("train", "heldout"))
    assert len(train) >= 72
    assert len(held_out) >= 24
    for part in (train, held_out):
        counts = Counter(row["score"] for row in part)
        assert set(counts) == set(range(6))
        assert max(counts.values()) == min(counts.values())


def test_held_out_judge_examples_share_nothing_with_those_to_train_on():
    train, held_out = ([row for row in JUDGE if row["split"] == split] for split in ("train", "heldout"))
    for field in ("set", "instruction", "response"):
        assert not {row[field] for row in train} & {row[field] for row in held_out}
    instructions = [list(dict.fromkeys(row["instruction"] for row in part)) for part in (held_out, train)]
    assert close(instructions[0], 0.5, instructions[1]) == []
    sets = held_out_sets(JUDGE)
    assert sum(len(ranked.replies) for ranked in sets) == len(held_out)
    assert all(len(set(ranked.ranks)) >= 2 for ranked in sets)


def test_no_two_justifications_are_alike_and_none_states_its_score():
    assert close(JUSTIFICATIONS, 0.6) == []
    for row in JUDGE:
        assert not re.search(r"score\s*[:=]", row["justification"], re.IGNORECASE)
        assert "\n" not in row["justification"]


def test_validation_and_test_prompts_are_disjoint_from_the_seeds_and_from_each_other():
    assert len(VALIDATION) == len(TEST) == 64
    assert close([*VALIDATION, *TEST], 0.7, [*PROMPTS, *JUDGED]) == []


def test_texts_are_short():
    assert share_under(80, REPLIES) >= 0.9
    assert share_under(80, [row["response"] for row in JUDGE]) >= 0.9
    assert share_under(35, JUSTIFICATIONS) >= 0.9


def test_ids_are_unique_over_all_files():
    ids = [tree["message_tree_id"] for tree in TREES] + [row["id"] for row in JUDGE]
    ids += [key for name in ("validation.jsonl", "test.jsonl") for key, _ in prompt_texts("", name)]
    assert len(set(ids)) == len(ids)


def test_no_text_holds_a_control_token_or_ends_in_space():
    texts = [*PROMPTS, *REPLIES, *JUDGED, *JUSTIFICATIONS, *VALIDATION, *TEST]
    assert [text for text in texts if "<|" in text or text != text.strip()] == []


def test_rouge_score_gives_the_same_verdicts_on_a_sample_of_pairs():
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    rng = random.Random(0)
    everything = [*PROMPTS, *JUDGED, *VALIDATION, *TEST]
    pairs = [(rng.sample(everything, 2), above) for above in (0.5, 0.7) for _ in range(150)]
    pairs += [(rng.sample(JUSTIFICATIONS, 2), 0.6) for _ in range(100)]
    pairs += [([text, f"{text} please do it now"], 0.7) for text in rng.sample(everything, 20)]
    verdicts = Counter()
    for (one, other), above in pairs:
        similar = scorer.score(one, other)["rougeL"].fmeasure > above
        assert RougeIndex(above, [one]).is_similar(other) == similar, (one, other)
        verdicts[similar] += 1
    assert min(verdicts[True], verdicts[False]) >= 10


@pytest.mark.slow
@pytest.mark.demo
def test_the_demo_tokenizer_agrees():
    path = fetch.cache_folder() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip("the demo model is not in the cache")
    from selfreward_jax.weights import gguf_io

    tokenizer = gguf_io.tokenizer(path)

    def tokens(text):
        return len(tokenizer(text).input_ids)

    responses = [row["response"] for row in JUDGE]
    assert share_under(80, REPLIES, tokens) >= 0.9
    assert share_under(80, responses, tokens) >= 0.9
    assert share_under(35, JUSTIFICATIONS, tokens) >= 0.9
    for text in [*REPLIES, *responses, *JUSTIFICATIONS]:
        assert tokens(text) <= most_tokens(text) + 3, text  # short lists of rare names need up to 3 more
