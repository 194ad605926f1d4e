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
    shapes = mapping.flat(llama.abstract(everything))
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
def test_what_is_written_in_our_axes_lies_in_the_files(everything, tensor):
    shape = mapping.stored_shape(tensor, everything)
    stored = np.arange(np.prod(shape)).reshape(shape)
    ours = mapping.to_ours(tensor, everything, stored)
    assert ours.shape == tuple(mapping.sizes(everything)[letter] for letter in tensor.ours)
    back = np.empty_like(stored)
    mapping.to_ours(tensor, everything, back)[...] = ours.copy()
    np.testing.assert_array_equal(back, stored)


@pytest.mark.parametrize("tensor", mapping.TABLE, ids=lambda tensor: tensor.path)
def test_rows_of_the_file_are_values_of_their_first_letter(everything, tensor):
    stored = np.random.default_rng(0).normal(size=mapping.stored_shape(tensor, everything))
    rows, axis = mapping.leading_rows(tensor, everything), tensor.ours.index(tensor.stored[0])
    assert rows == (everything.head_dim if tensor.stored[:2] in ("NH", "KH") else 1)
    ours = mapping.to_ours(tensor, everything, stored)
    some = mapping.to_ours(tensor, everything, stored[rows : 2 * rows])
    np.testing.assert_array_equal(some, ours.take([1], axis))


def test_the_query_projection_is_the_one_that_torch_applies(everything):
    config, tensor = everything, next(row for row in mapping.TABLE if row.path.endswith("/q"))
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(config.q_heads * config.head_dim, config.embed)), rng.normal(size=config.embed)
    ours = np.einsum("D,DNH->NH", x, mapping.to_ours(tensor, config, weight))
    np.testing.assert_allclose(ours, (weight @ x).reshape(config.q_heads, config.head_dim), rtol=1e-12)
