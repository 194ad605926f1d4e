"""Places that are none, and what one process alone does; real jobs are in tests/multiprocess."""

import pytest

from selfreward_jax import processes
from selfreward_jax.errors import UserError
from selfreward_jax.processes import Place


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (Place(coordinator="a:1"), "give all three"),
        (Place(count=2, index=0), "give all three"),
        (Place(coordinator="a:1", count=2), "give all three"),
        (Place(coordinator="a:1", count=2, index=2), "--process_id=2: from 0 to 1"),
        (Place(coordinator="nowhere", count=2, index=1), "must be HOST:PORT"),
        (Place(coordinator="a:99999", count=2, index=1), "the port from 1 to 65535"),
        (Place(coordinator="a:0", count=2, index=0), "the port from 1 to 65535"),
        (Place(heartbeat=0), "--heartbeat_timeout=0: at least 1 second"),
        (Place(coordinator="a:1", timeout=-5), r"(?s)give all three.*--join_timeout=-5: at least 1 second"),
    ],
)
def test_a_place_that_is_none_is_refused(place, says):
    with pytest.raises(UserError, match=says):
        processes.start(place, {})


def test_one_process_is_its_own_first():
    processes.start(Place(), {})
    assert (processes.index(), processes.count()) == (0, 1)
    assert processes.together(lambda: {"a": (1, 2)}) == {"a": (1, 2)}
    assert processes.each(lambda: 3) == 3
    for do in (processes.together, processes.each):
        with pytest.raises(UserError) as caught:
            do(lambda: (_ for _ in ()).throw(UserError("one", "two")))
        assert caught.value.args == ("one", "two") and not caught.value.shared
