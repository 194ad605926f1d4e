"""Sharding as a table: logical axes of arrays to mesh axes, with a collision check and no catch-all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from selfreward_jax.errors import UserError

Rules = Mapping[str, str | tuple[str, ...] | None]

# Rows of a batch are split over both; parameters are split over fsdp and gathered layer by layer (ZeRO-3).
BATCH = ("data", "fsdp")

# How parameters, gradients and optimizer moments are stored while training.
STORED: Rules = {
    "rows": BATCH,
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "q_heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ffn": "tensor",
    "norm": None,  # scales and biases of width D: 0.01 % of the bytes, needed whole everywhere
}
# How a layer's parameters are laid out while training uses them: the fsdp axis is gathered away.
COMPUTED: Rules = {**STORED, "embed": None}
# How parameters are stored and used while sampling, on a mesh of its own (sharding/choose.py): nothing is gathered, since
# a decode step reads each weight once for few rows. Query heads, ffn and vocabulary are cut over `fsdp` as well as
# `tensor`; kv heads over `tensor` only, so that there may be more shards than kv heads.
GENERATION: Rules = {
    "rows": "data",
    "layers": None,
    "vocab": ("tensor", "fsdp"),
    "embed": None,
    "q_heads": ("tensor", "fsdp"),
    "kv_heads": "tensor",
    "head_dim": None,
    "ffn": ("tensor", "fsdp"),
    "norm": None,
}
# Less than this share of the parameter bytes where a table means them is a refusal: scales of norms are 0.01 % of a 70B.
COVERED = 0.98
# The layouts of parameters: how they lie in memory, and how a layer lays them out while it uses them.
LAYOUTS: Mapping[str, tuple[Rules, Rules]] = {"training": (STORED, COMPUTED), "generation": (GENERATION, GENERATION)}


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a table or of a partition spec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def spec(axes: tuple[str, ...], rules: Rules) -> P:
    """The partition spec of an array with these logical axes.

    Raises:
        KeyError: for a logical axis that the table does not have (there is no catch-all).
        ValueError: if one mesh axis would be used twice.
    """
    entries = [rules[axis] for axis in axes]
    used = [name for entry in entries for name in mesh_axes(entry)]
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


def extents(axes_tree: Any, abstract: Any) -> dict[str, int]:
    """The size of each logical axis of a model."""
    found: dict[str, int] = {}
    for axes, array in zip(jax.tree.leaves(axes_tree, is_leaf=is_axes), jax.tree.leaves(abstract), strict=True):
        found |= dict(zip(axes, array.shape, strict=True))
    return found


def misfits(sizes: Mapping[str, int], mesh_sizes: Mapping[str, int], rules: Rules) -> list[str]:
    """A line for each logical axis that its mesh axes do not divide.

    Args:
        sizes: `extents` of a model.
        mesh_sizes: sizes of the mesh axes.
    """
    lines = []
    for axis, size in sizes.items():
        names = mesh_axes(rules[axis])
        if size % math.prod(mesh_sizes[name] for name in names):
            by = " x ".join(f"{name}={mesh_sizes[name]}" for name in names)
            lines.append(f"{axis} has {size}, which mesh axis {by} does not divide")
    return lines


def check_divides(
    axes_tree: Any, abstract: Any, mesh: jax.sharding.Mesh, rules: Rules = STORED, option: str = "--config.mesh"
) -> None:
    """Refuses a mesh that does not divide the parameters.

    Args:
        axes_tree: logical axes, a leaf for each leaf of `abstract`.
        abstract: tree of arrays or `ShapeDtypeStruct`.
        option: what the lines name.

    Raises:
        UserError: with a line for each logical axis whose size its mesh axes do not divide.
    """
    problems = misfits(extents(axes_tree, abstract), mesh.shape, rules)
    if problems:
        raise UserError(*(f"{option}: {line}" for line in problems))


def check_covered(axes_tree: Any, tree: Any, mesh: jax.sharding.Mesh, rules: Rules = STORED) -> float:
    """The share of the parameter bytes that is cut over mesh axes of more than one device.

    An axis of size 1 cuts nothing: on 8x1x1 the share is 0. That is the mesh's choice (copies), and no error; nor are
    kv heads that a table leaves whole where `tensor` is 1.

    Args:
        tree: arrays, or `ShapeDtypeStruct` with shardings.

    Raises:
        UserError: if over 2 % of the bytes lie otherwise than the table means on this mesh, or are named by it for no
            axis at all: a line for each such array.
    """
    cut, astray, total, lines = 0, 0, 0, []
    paths = jax.tree_util.tree_leaves_with_path(tree)
    for (path, array), axes in zip(paths, jax.tree.leaves(axes_tree, is_leaf=is_axes), strict=True):
        meant = NamedSharding(mesh, spec(axes, rules))
        size = math.prod(array.shape) * array.dtype.itemsize
        total += size
        if not array.sharding.is_equivalent_to(meant, len(array.shape)) or not any(meant.spec):
            astray += size
            lines.append(f"{_name(path)} {list(array.shape)} lies as {array.sharding.spec}, meant is {meant.spec}")
        elif meant.shard_shape(array.shape) != array.shape:
            cut += size
    if total - astray < COVERED * total:
        raise UserError(
            f"--config.mesh: {1 - astray / total:.1%} of the parameter bytes are cut over the mesh as meant", *lines
        )
    return cut / total


def check_alike(params: Any, state: Any) -> None:
    """Refuses trees of the parameters' structure, such as both moments, that lie otherwise than the parameters.

    Args:
        state: any tree of arrays; only the subtrees that are built as `params` are looked at, and in them the arrays of
            a parameter's shape (Adafactor's rows and columns are not).

    Raises:
        UserError: a line for each such array.
    """
    structure, lines = jax.tree.structure(params), []

    def alike(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    paths = jax.tree_util.tree_leaves_with_path(params)
    for tree in filter(alike, jax.tree.leaves(state, is_leaf=alike)):
        for (path, param), array in zip(paths, jax.tree.leaves(tree), strict=True):
            if array.shape == param.shape and not array.sharding.is_equivalent_to(param.sharding, param.ndim):
                lines.append(f"{_name(path)}: {array.sharding.spec}, the parameter as {param.sharding.spec}")
    if lines:
        raise UserError("--config.mesh: the optimizer's arrays lie otherwise than their parameters", *lines)


def _shown(partition: P) -> str:
    """`tensor+fsdp, -`: the mesh axes of each dimension."""
    return ", ".join("+".join(mesh_axes(entry)) or "-" for entry in partition)


def _name(path: Any) -> str:
    return "/".join(str(key.key) for key in path)


def table(
    axes_tree: Any, abstract: Any, mesh: jax.sharding.Mesh, rules: Rules = STORED
) -> list[tuple[str, str, str, int]]:
    """Rows (parameter, shape, mesh axes of each dimension, bytes a device) of the layout, for printing."""
    rows = []
    paths = jax.tree_util.tree_leaves_with_path(abstract)
    for (path, array), axes in zip(paths, jax.tree.leaves(axes_tree, is_leaf=is_axes), strict=True):
        partition = spec(axes, rules)
        shard = NamedSharding(mesh, partition).shard_shape(array.shape)
        size = array.dtype.itemsize
        for extent in shard:
            size *= extent
        rows.append((_name(path), "x".join(map(str, array.shape)), _shown(partition), size))
    return rows
