"""Checkpoints: what was saved comes back, where it belongs, or an error says why not."""

import gc
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from selfreward_jax.errors import UserError
from selfreward_jax.training import checkpoint
from selfreward_jax.training.optimizer import Optimizer, make


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def tree(mesh, seed=0):
    rng = np.random.default_rng(seed)
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))  # noqa: E731
    return {
        "embed": put(rng.normal(size=(8, 4)).astype(np.float32), "tensor", "fsdp"),
        "layers": {"scale": put(jnp.asarray(rng.normal(size=(2, 4)), jnp.bfloat16), None, None)},
    }


def assert_same(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("mesh", [(2, 2, 2)], indirect=True)
def test_parameters_come_back_on_their_devices(mesh, mesh_of, folder):
    params = tree(mesh)
    checkpoint.save_params(folder / "params", params)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params)
    assert_same(checkpoint.load_params(folder / "params", like), params)
    one = tree(mesh_of((1, 1, 1)), seed=1)  # another mesh, other values: only shapes and places of `like` count
    got = checkpoint.load_params(folder / "params", one)
    np.testing.assert_array_equal(got["embed"], params["embed"])
    assert got["embed"].sharding == one["embed"].sharding
    checkpoint.save_params(folder / "params", tree(mesh, seed=2))  # a second run of the stage replaces it
    assert_same(checkpoint.load_params(folder / "params", like), tree(mesh, seed=2))


def test_missing_parameters_are_a_users_error(mesh, folder):
    with pytest.raises(UserError, match="no parameters here"):
        checkpoint.load_params(folder / "params", tree(mesh))


# orbax leaves coroutines behind when one array of several cannot be read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("change", ["shape", "missing", "extra", "empty", "cut"])
def test_other_parameters_are_a_users_error(change, mesh, folder):
    params = tree(mesh)
    checkpoint.save_params(folder / "params", params)
    like = dict(params)
    if change == "shape":
        like["embed"] = jnp.zeros((9, 4))
    elif change == "missing":
        like["head"] = jnp.zeros((4, 8))
    elif change == "extra":
        del like["layers"]
    elif change == "empty":
        (folder / "params").rmtree()
        (folder / "params").mkdir()
    else:
        for file in Path(folder / "params").glob("**/d/*"):
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read as this model's parameters"):
        checkpoint.load_params(folder / "params", like)
    gc.collect()


def test_the_newest_training_state_comes_back(mesh, folder):
    spec = Optimizer(lr=0.1, lr_end=0.1, steps=9)
    like = {"params": tree(mesh), "state": make(spec).init(tree(mesh))}
    checkpoints = checkpoint.open_folder(folder / "checkpoints", keep=2)
    assert checkpoint.restore(checkpoints, like) is None
    states = {}

    def names():
        return sorted(path.name for path in (folder / "checkpoints").iterdir())

    for number in (3, 6, 9):
        params = tree(mesh, seed=number)
        _, state = make(spec).update(params, like["state"], params)
        states[number] = {"params": params, "state": state}
        checkpoint.save(checkpoints, number, states[number])
    checkpoint.close(checkpoints)
    assert names() == ["3", "6", "9"]  # two, and the last
    (folder / "checkpoints" / "12.orbax-checkpoint-tmp-1").mkdir()  # a kill left it
    again = checkpoint.open_folder(folder / "checkpoints", keep=2)
    found = checkpoint.restore(again, like)
    assert found
    number, got = found
    checkpoint.close(again)
    assert names() == ["6", "9"]
    assert number == 9
    assert jax.tree.structure(got) == jax.tree.structure(like)  # optax's tuples, not lists or dicts
    assert_same(got, states[9])


@pytest.fixture
def small_files():
    """A disk that takes no file over 64 KB, until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def asked(checkpoints, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        checkpoint.check(checkpoints)


def test_a_disk_that_takes_no_more_is_one_line(folder, small_files, caplog):
    big = {"a": jax.random.normal(jax.random.key(0), (512, 512))}
    with pytest.raises(UserError) as raised:
        checkpoint.save_params(folder / "params", big)
    assert str(raised.value) == (
        f"{folder}/params: cannot be written (File too large [os_error_code='27']); make room or mend it, then start"
        " again to go on from here"
    )
    assert not (folder / "params").exists()
    checkpoints = checkpoint.open_folder(folder / "checkpoints", 2)
    checkpoint.save(checkpoints, 1, big)  # goes on beside the training, which asks
    with pytest.raises(UserError, match=r"checkpoints: cannot be written \(File too large"):
        asked(checkpoints, seconds=20)
    checkpoint.save(checkpoints, 1, big)
    with pytest.raises(UserError, match=r"checkpoints: cannot be written \(File too large"):
        checkpoint.save(checkpoints, 2, big)
    checkpoint.close(checkpoints)
    assert not caplog.records
