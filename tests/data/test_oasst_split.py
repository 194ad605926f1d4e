"""The split of seed data: parts share no prompt, lose none, are the same everywhere; errors name options."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.data import oasst
from selfreward_jax.errors import UserError


def seed_of(sets, examples):
    return oasst.Seed(
        tuple(oasst.Example(f"p{n}", f"prompt {n}", "r", "oasst") for n in range(examples)),
        tuple(oasst.RankedSet(f"p{n}", f"prompt {n}", ("a", "b"), (0, 1)) for n in range(sets)),
        {},
    )


def hashed(salt, names):
    """The order that sha256 gives these ids."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}\n{name}".encode()).hexdigest())


def ids(items):
    return [item.id for item in items]


@settings(deadline=None, max_examples=120, database=None)
@given(st.data(), st.integers(0, 12), st.integers(0, 12), st.integers(0, 3))
def test_parts_are_disjoint_and_lose_nothing(data, sets, more, seed):
    seed_data = seed_of(sets, sets + more)
    n_eval = data.draw(st.integers(-1, sets))
    left = sets if n_eval == -1 else n_eval
    n_ift = data.draw(st.integers(-1, sets + more - left))
    n_train = data.draw(st.sampled_from([-1, 0, 1, 2]))
    try:
        parts = oasst.split(seed_data, n_ift, n_eval, n_train, seed)
    except UserError:
        # Only a fixed number of sets can be too many: IFT may have drawn the prompts that have a ranking.
        with pytest.raises(UserError, match=f"^eft.train_sets={n_train}: "):
            oasst.split(seed_data, n_ift, n_eval, n_train, seed)
        assert n_train > 0
        return
    every = [*parts.ift, *parts.eft_train, *parts.eft_eval, *parts.rest]
    assert sorted(ids(every)) == sorted(ids(seed_data.examples))
    assert len(parts.eft_eval) == (sets if n_eval == -1 else n_eval)
    if n_train != -1:
        assert len(parts.eft_train) == n_train
    if n_ift == -1:
        assert not parts.rest
    else:
        assert len(parts.ift) == n_ift
    if n_train == -1:
        ranked = set(ids(seed_data.sets))
        assert not ranked & set(ids(parts.rest))
        assert n_ift == -1 or ranked - set(ids(parts.eft_eval)) - set(ids(parts.ift)) == set(ids(parts.eft_train))
    backwards = oasst.Seed(seed_data.examples[::-1], seed_data.sets[::-1], {})
    assert oasst.split(backwards, n_ift, n_eval, n_train, seed) == parts


def test_a_split_is_the_same_on_every_machine():
    parts = oasst.split(seed_of(9, 20), 5, 3, 2, 0)
    taken = ["p1", "p3", "p6"]
    assert ids(parts.eft_eval) == taken
    assert ids(parts.ift) == hashed("examples 0", {f"p{n}" for n in range(20)} - {*taken})[:5]
    taken += ids(parts.ift)
    assert ids(parts.eft_train) == hashed("sets 0", {f"p{n}" for n in range(9)} - {*taken})[:2]
    assert oasst.split(seed_of(9, 20), 5, 3, 2, 1) != parts


def test_a_size_moves_no_part_that_is_claimed_before_it():
    parts = oasst.split(seed_of(9, 20), 5, 3, 1, 0)
    for n_ift, n_train in ((9, 0), (-1, 2), (2, -1)):
        assert oasst.split(seed_of(9, 20), n_ift, 3, n_train, 0).eft_eval == parts.eft_eval
    for n_train in (0, 2, -1):
        assert oasst.split(seed_of(9, 20), 5, 3, n_train, 0).ift == parts.ift
    assert oasst.split(seed_of(9, 20), 6, 3, 0, 0).ift[:5] == parts.ift


def test_the_paper_fits_where_there_are_fewer_ranked_sets_than_its_sizes_together():
    """190 evaluation sets, 3,200 IFT examples: what is left trains the judge, as many as that is (3.1.1)."""
    parts = oasst.split(seed_of(3900, 4000), 3200, 190, -1, 0)
    assert (len(parts.eft_eval), len(parts.ift)) == (190, 3200)
    assert 500 < len(parts.eft_train) <= 610
    assert len(parts.eft_train) + len(parts.rest) == 610


def test_ift_takes_what_the_sets_leave_where_it_takes_all():
    parts = oasst.split(seed_of(9, 20), -1, 3, 4, 0)
    assert len(parts.eft_train) == 4 and len(parts.ift) == 13 and not parts.rest
    assert ids(parts.eft_train) == ids(oasst.split(seed_of(9, 9), 0, 3, 4, 0).eft_train)


def test_parts_are_told_apart_by_their_questions_not_by_ids_that_meet_by_chance():
    own = tuple(oasst.Example(f"p{n}", f"my own {n}", "r", "mine") for n in range(4))
    parts = oasst.split(oasst.Seed(own, seed_of(4, 0).sets, {}), 4, 2, 2, 0)
    assert sorted(ids(parts.ift)) == ids(own)
    shouted = oasst.Example("x", "PROMPT  1", "r", "mine")
    sets = oasst.split(oasst.Seed((shouted,), seed_of(4, 0).sets, {}), 1, 0, -1, 0).eft_train
    assert sorted(ids(sets)) == ["p0", "p2", "p3"]


def test_asking_for_too_much_names_the_options():
    with pytest.raises(UserError) as caught:
        oasst.split(seed_of(4, 10), 20, 3, 2, 0)
    assert caught.value.args == (
        (
            "data.ift_examples=20: there are 7 examples beside 3 sets for evaluation; "
            "lower data.ift_examples or set it to -1 (all)"
        ),
        (
            "eft.train_sets=2: there are 0 ranked sets beside 3 sets for evaluation and 7 examples for IFT; "
            "lower eft.train_sets or set it to -1 (all)"
        ),
    )
    with pytest.raises(UserError, match=r"eft\.eval_sets=5: there are 4 ranked sets; lower"):
        oasst.split(seed_of(4, 10), 1, 5, 0, 0)
