"""Sharding as a table: logical axes of arrays to mesh axes, with a collision check and no catch-all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from selfreward_jax.errors import UserError

Rules = Mapping[str, str | tuple[str, ...] | None]

# Rows of a batch are split over both; parameters are split over fsdp and gathered layer by layer (ZeRO-3).
BATCH = ("data", "fsdp")

# How parameters, gradients and optimizer moments are stored.
STORED: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "q_heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ffn": "tensor",
    "norm": None,  # scales and biases of width D: 0.01 % of the bytes, needed whole everywhere
}
# How a layer's parameters are laid out while they are used: the fsdp axis is gathered away.
COMPUTED: Rules = {**STORED, "embed": None}


def spec(axes: tuple[str, ...], rules: Rules) -> P:
    """The partition spec of an array with these logical axes.

    Raises:
        KeyError: for a logical axis that the table does not have (there is no catch-all).
        ValueError: if one mesh axis would be used twice.
    """
    entries = [rules[axis] for axis in axes]
    used = [name for entry in entries if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    if len(set(used)) != len(used):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {entries}")
    return P(*entries)


def is_axes(node: Any) -> bool:
    """True for a leaf of a tree of logical axes."""
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)


def specs(axes_tree: Any, rules: Rules) -> Any:
    """A tree of partition specs from a tree of logical axes."""
    return jax.tree.map(lambda axes: spec(axes, rules), axes_tree, is_leaf=is_axes)


def shardings(axes_tree: Any, mesh: jax.sharding.Mesh, rules: Rules = STORED) -> Any:
    """A tree of `NamedSharding` from a tree of logical axes."""
    return jax.tree.map(lambda axes: NamedSharding(mesh, spec(axes, rules)), axes_tree, is_leaf=is_axes)


def check_divides(axes_tree: Any, abstract: Any, mesh: jax.sharding.Mesh, rules: Rules = STORED) -> None:
    """Refuses a mesh that does not divide the parameters.

    Args:
        axes_tree: logical axes, a leaf for each leaf of `abstract`.
        abstract: tree of arrays or `ShapeDtypeStruct`.

    Raises:
        UserError: with a line for each logical axis whose size a mesh axis does not divide.
    """
    problems: dict[str, str] = {}
    for axes, array in zip(jax.tree.leaves(axes_tree, is_leaf=is_axes), jax.tree.leaves(abstract), strict=True):
        for axis, size in zip(axes, array.shape, strict=True):
            entry = rules[axis] or ()
            for name in (entry,) if isinstance(entry, str) else entry:
                if size % mesh.shape[name]:
                    problems[axis] = f"{axis} has {size}, which mesh axis {name}={mesh.shape[name]} does not divide"
    if problems:
        raise UserError(*(f"--config.mesh: {line}" for line in problems.values()))


def table(
    axes_tree: Any, abstract: Any, mesh: jax.sharding.Mesh, rules: Rules = STORED
) -> list[tuple[str, str, str, int]]:
    """Rows (parameter, shape, spec, bytes a device) of the layout, for printing and for the coverage check."""
    rows = []
    paths = jax.tree_util.tree_leaves_with_path(abstract)
    for (path, array), axes in zip(paths, jax.tree.leaves(axes_tree, is_leaf=is_axes), strict=True):
        partition = spec(axes, rules)
        shard = NamedSharding(mesh, partition).shard_shape(array.shape)
        size = array.dtype.itemsize
        for extent in shard:
            size *= extent
        name = "/".join(str(key.key) for key in path)
        rows.append((name, "x".join(map(str, array.shape)), str(partition), size))
    return rows
