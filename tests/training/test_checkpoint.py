"""Checkpoints: what was saved comes back, where it belongs, or an error says why not."""

import random
import re
import resource
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from selfreward_jax.errors import UserError
from selfreward_jax.training import checkpoint, checksum
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
    says = "damaged, it cannot be read" if change in ("empty", "cut") else "holds another model's arrays: arrays"
    with pytest.raises(UserError, match=f"{folder}/params: {says}.*; delete the folder to have its stage done again"):
        checkpoint.load_params(folder / "params", like)


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
    assert names() == ["3", "6", "9"]  # what an older one is good for shows only when it has been read
    assert number == 9
    assert jax.tree.structure(got) == jax.tree.structure(like)  # optax's tuples, not lists or dicts
    assert_same(got, states[9])


def damage(path, seed):
    """Changes a file of an orbax folder as a seed says, or deletes it; which, and how."""
    draw = random.Random(seed)
    file = draw.choice(sorted(file for file in Path(path).rglob("*") if file.is_file() and file.stat().st_size))
    data, how = bytearray(file.read_bytes()), draw.choice(["flip", "flip", "flip", "cut", "zero", "gone"])
    at = draw.randrange(len(data))
    if how == "gone":
        file.unlink()
        return file, how
    if how == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del data[at:]
    else:
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    file.write_bytes(data)
    return file, how


@pytest.mark.parametrize("mesh", [(2, 2, 2)], indirect=True)
def test_what_is_damaged_is_passed_over_and_never_taken_for_what_was_saved(mesh, folder, capsys):
    saved = {number: tree(mesh, seed=number) for number in (3, 6)}
    checkpoints = checkpoint.open_folder(folder / "checkpoints", keep=1)
    for number, state in saved.items():
        checkpoint.save(checkpoints, number, state)
    checkpoint.close(checkpoints)
    shutil.copytree(folder / "checkpoints", folder / "whole")
    passed = 0
    for seed in range(40):
        what = damage(folder / "checkpoints" / "6", seed)
        found = checkpoint.restore(checkpoints, saved[3])
        assert found, what
        passed += found[0] == 3
        assert_same(found[1], saved[found[0]])
        said = capsys.readouterr().out
        assert (found[0] == 3) == bool(said)
        if said:
            assert re.match(rf"{folder}/checkpoints/6: (damaged|holds another).*; the one before it is used\n", said), said
        shutil.rmtree(folder / "checkpoints")
        shutil.copytree(folder / "whole", folder / "checkpoints")
    assert passed > 10  # the others hit what is not read: orbax keeps files of the processes beside the merged ones


def test_a_bit_of_the_arrays_themselves_is_found_by_its_name(mesh, folder, monkeypatch, capsys):
    """As memory or a network may change it, behind all sums of files."""
    checkpoints = checkpoint.open_folder(folder / "checkpoints", keep=2)
    state = tree(mesh)
    for number in (1, 2):
        checkpoint.save(checkpoints, number, state)
    checkpoint.close(checkpoints)
    checkpoints = checkpoint.open_folder(folder / "checkpoints", keep=2)
    read, first = checkpoint._read_here, []

    def flipped(directory, wanted):
        found = read(directory, wanted)
        if not first:
            first.append(directory)
            words = np.array(found["arrays"]["embed"]).view(np.uint32)
            words[5, 2] ^= 1 << 7
            found["arrays"]["embed"] = jax.device_put(words.view(np.float32), state["embed"].sharding)
        return found

    monkeypatch.setattr(checkpoint, "_read_here", flipped)
    found = checkpoint.restore(checkpoints, state)
    checkpoint.close(checkpoints)
    assert found and found[0] == 1
    assert "checkpoints/2: damaged: embed not as saved; the one before it is used" in capsys.readouterr().out


def test_checkpoints_of_another_model_are_refused_and_stay(mesh, folder):
    checkpoints = checkpoint.open_folder(folder / "checkpoints", keep=2)
    checkpoint.save(checkpoints, 1, tree(mesh))
    checkpoint.close(checkpoints)
    other = tree(mesh) | {"embed": jnp.zeros((9, 4), device=NamedSharding(mesh, P()))}
    says = r"another model's arrays: arrays.embed is float32\[8, 4\], not float32\[9, 4\]; move the folder away"
    with pytest.raises(UserError, match=says):
        checkpoint.restore(checkpoints, other)
    assert (folder / "checkpoints" / "1").exists()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_sum_sees_every_change_of_one_bit(data):
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "int32", "uint8"]))
    shape = data.draw(st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 4)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    raw = rng.integers(0, 256, (*shape, np.dtype(jnp.dtype(dtype)).itemsize), np.uint8)
    changed = raw.copy()
    place = data.draw(st.integers(0, raw.size - 1))
    changed.reshape(-1)[place] ^= 1 << data.draw(st.integers(0, 7))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    one, other = (checksum.sums([jnp.asarray(some.view(jnp.dtype(dtype)).reshape(shape))], mesh) for some in (raw, changed))
    assert one != other


@pytest.mark.parametrize("shape", [(16, 8), (3, 16, 8)])
def test_a_sum_is_the_formula_and_the_same_on_every_mesh(shape, mesh_of):
    words = np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)
    place = np.arange(words.size, dtype=np.uint64).reshape(words.shape)
    mixed = place * 2654435769 % 2**32
    odd = (mixed ^ (mixed >> 15)) | 1
    want = int(((words.astype(np.uint64) + 1) * odd % 2**32).sum() % 2**32)
    for devices in ((1, 1, 1), (2, 2, 2), (1, 4, 2)):
        mesh = mesh_of(devices)
        put = jax.device_put(words.view(np.float32), NamedSharding(mesh, P(*(None,) * (len(shape) - 2), "tensor", "fsdp")))
        assert checksum.sums({"a": put}, mesh).tolist() == [want]


@pytest.mark.parametrize("mesh", [(2, 2, 2)], indirect=True)
def test_a_sum_takes_no_memory_of_the_size_of_its_array(mesh):
    big = jax.ShapeDtypeStruct((64, 256, 512), jnp.float32, sharding=NamedSharding(mesh, P(None, "tensor", "fsdp")))
    used = checksum._sums.lower([big]).compile().memory_analysis()
    assert used.temp_size_in_bytes < used.argument_size_in_bytes / 25  # two of 64 layers


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


def test_a_disk_that_takes_no_more_is_one_line(mesh, folder, small_files, caplog):
    big = {"a": jax.device_put(jax.random.normal(jax.random.key(0), (512, 512)), NamedSharding(mesh, P()))}
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
