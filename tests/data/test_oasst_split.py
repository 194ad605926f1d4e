"""The split of seed data: parts share no prompt, lose none, are the same everywhere; errors name options."""

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


@settings(deadline=None, max_examples=60, database=None)
@given(st.data(), st.integers(0, 12), st.integers(0, 12), st.integers(0, 3))
def test_parts_are_disjoint_and_lose_nothing(data, sets, more, seed):
    seed_data = seed_of(sets, sets + more)
    n_eval = data.draw(st.integers(-1, sets))
    left = 0 if n_eval == -1 else sets - n_eval
    n_train = data.draw(st.integers(-1, left))
    taken = sets if -1 in (n_eval, n_train) else n_eval + n_train
    n_ift = data.draw(st.integers(-1, sets + more - taken))
    parts = oasst.split(seed_data, n_ift, n_eval, n_train, seed)
    ids = [item.id for part in (parts.ift, parts.eft_train, parts.eft_eval, parts.rest) for item in part]
    assert sorted(ids) == sorted(example.id for example in seed_data.examples)
    assert len(parts.ift) == (sets + more - taken if n_ift == -1 else n_ift)
    assert len(parts.eft_eval) == (sets if n_eval == -1 else n_eval)
    backwards = oasst.Seed(seed_data.examples[::-1], seed_data.sets[::-1], {})
    assert oasst.split(backwards, n_ift, n_eval, n_train, seed) == parts


def test_a_split_is_the_same_on_every_machine():
    parts = oasst.split(seed_of(9, 20), 5, 3, 2, 0)
    assert [item.id for item in parts.eft_eval] == ["p1", "p3", "p6"]
    assert oasst.split(seed_of(9, 20), 9, 3, 2, 0).eft_eval == parts.eft_eval  # the size of IFT moves no set
    assert oasst.split(seed_of(9, 20), 5, 3, 2, 1) != parts


def test_asking_for_too_much_names_the_options():
    with pytest.raises(UserError) as caught:
        oasst.split(seed_of(4, 10), 20, 3, 2, 0)
    assert caught.value.args == (
        (
            "eft.train_sets=2: there are 1 ranked sets after the 3 for evaluation; "
            "lower eft.train_sets or set it to -1 (all)"
        ),
        (
            "data.ift_examples=20: there are 6 examples after the 4 sets for EFT; "
            "lower data.ift_examples or set it to -1 (all)"
        ),
    )
    with pytest.raises(UserError, match=r"eft\.eval_sets=5: there are 4 ranked sets"):
        oasst.split(seed_of(4, 10), 1, 5, 0, 0)
    with pytest.raises(UserError, match=r"data\.ift_examples=-2: must be -1"):
        oasst.split(seed_of(4, 10), -2, 1, 1, 0)
