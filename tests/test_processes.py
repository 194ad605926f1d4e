"""Which machines start several processes, and what one process alone does; real jobs are in tests/multiprocess."""

import pytest

from selfreward_jax import processes
from selfreward_jax.errors import UserError
from selfreward_jax.processes import Place


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # a shell on one node of an allocation
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "many"}, False),
        ({}, False),
    ],
)
def test_who_starts_several(environment, expected):
    assert processes.several({"JAX_PLATFORMS": "cpu"} | environment) is expected


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (Place(coordinator="a:1"), "give all three"),
        (Place(count=2, index=0), "give all three"),
        (Place(coordinator="a:1", count=2), "give all three"),
        (Place(coordinator="a:1", count=2, index=2), "--process_id=2: from 0 to 1"),
        (Place(coordinator="nowhere", count=2, index=1), "must be HOST:PORT"),
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
