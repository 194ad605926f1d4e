"""The table of tensor names: every parameter once, and the letters turn arrays both ways."""

import dataclasses

import numpy as np
import pytest

from selfreward_jax.model import llama
from selfreward_jax.weights import mapping


@pytest.fixture
def everything(even):
    """A config with every optional parameter."""
    return dataclasses.replace(even, qkv_bias=True, o_bias=True, mlp_bias=True)


def test_the_table_has_every_parameter_of_the_model_with_its_shape(everything):
    size = mapping.sizes(everything)
    shapes = mapping._flat(llama.abstract(everything))
    rows = mapping.tensors(everything)
    assert {tensor.path for tensor in rows} == set(shapes) == {tensor.path for tensor in mapping.TABLE}
    for tensor in rows:
        wanted = tuple(size[letter] for letter in tensor.ours)
        assert shapes[tensor.path].shape == (everything.layers,) * tensor.layered + wanted


def test_a_parameter_that_the_table_lacks_is_an_error(everything, monkeypatch):
    monkeypatch.setattr(mapping, "TABLE", mapping.TABLE[1:])
    with pytest.raises(KeyError, match="embed"):
        mapping.tensors(everything)


@pytest.mark.parametrize("field", ["hf", "gguf", "path"])
def test_names_are_unique(field):
    names = [getattr(tensor, field) for tensor in mapping.TABLE]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("tensor", mapping.TABLE, ids=lambda tensor: tensor.path)
def test_turning_there_and_back_gives_the_same_tensor(everything, tensor):
    stored = np.arange(np.prod(mapping.stored_shape(tensor, everything))).reshape(
        mapping.stored_shape(tensor, everything)
    )
    ours = mapping.to_ours(tensor, everything, stored)
    assert ours.shape == tuple(mapping.sizes(everything)[letter] for letter in tensor.ours)
    np.testing.assert_array_equal(mapping.to_stored(tensor, everything, ours), stored)


def test_the_query_projection_is_the_one_that_torch_applies(everything):
    config, tensor = everything, next(row for row in mapping.TABLE if row.path.endswith("/q"))
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(config.q_heads * config.head_dim, config.embed)), rng.normal(size=config.embed)
    ours = np.einsum("D,DNH->NH", x, mapping.to_ours(tensor, config, weight))
    np.testing.assert_allclose(ours, (weight @ x).reshape(config.q_heads, config.head_dim), rtol=1e-12)


@pytest.mark.parametrize("tensor", mapping.TABLE, ids=lambda tensor: tensor.path)
def test_slices_of_the_file_hold_the_same_part(everything, tensor):
    size = mapping.sizes(everything)
    cut = tuple(
        slice(0, size[letter]) if letter == "H" else slice(size[letter] // 2, size[letter]) for letter in tensor.ours
    )
    stored = np.random.default_rng(0).normal(size=mapping.stored_shape(tensor, everything))
    part = stored[mapping.stored_slices(tensor, everything, cut)]
    np.testing.assert_array_equal(
        mapping.to_ours(tensor, everything, part), mapping.to_ours(tensor, everything, stored)[cut]
    )


def test_a_cut_inside_a_head_is_refused(everything):
    tensor = next(row for row in mapping.TABLE if row.path.endswith("/q"))
    with pytest.raises(ValueError, match="axis H is cut"):
        mapping.stored_slices(tensor, everything, (slice(0, 16), slice(0, 4), slice(0, 3)))


def test_each_value_is_read_once_however_many_devices_hold_it(everything, mesh_of):
    size, read = mapping.sizes(everything), []

    def reader(tensor, layer, cut):
        shape = [axis.stop - axis.start for axis in cut]
        read.append(np.prod(shape))
        return np.zeros(shape)

    params = mapping.place(everything, mesh_of((2, 2, 2)), "bfloat16", reader)
    assert sum(read) == everything.parameter_count()
    assert params["embed"].shape == (size["V"], size["D"])
    assert {array.dtype.name for array in mapping._flat(params).values()} == {"bfloat16"}
    specs = mapping._flat(llama.stored_specs(everything))
    assert all(array.sharding.spec == specs[path] for path, array in mapping._flat(params).items())
