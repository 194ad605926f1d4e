"""Between the rows of a file's tensors and sharded stacked arrays, a few megabytes at a time, in both directions.

`place` fills the buffers of this process's own shards and gives them to the devices. A CPU takes them as they are, so
that the arrays are in memory once; for an accelerator one array's shards at a time lie in the host's memory.
`gather` and `stored_rows` go back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.model.llama import Params, abstract, logical_axes
from selfreward_jax.observe.progress import progress
from selfreward_jax.sharding.rules import STORED, Rules, check_divides, spec
from selfreward_jax.weights import mapping
from selfreward_jax.weights.mapping import Tensor

# (row of the table, layer, rows) -> these rows of the file's tensor of that layer.
Reader = Callable[[Tensor, int, slice], np.ndarray]
Span = tuple[int, int]  # start and stop
Bounds = tuple[Span, ...]  # a part of one of our arrays: a span of each axis

THREADS = min(4, os.cpu_count() or 1)
BLOCK_BYTES = 8 << 20  # that a thread reads, turns or hands on at a time
_TILE = 32  # rows turned at a time: a transpose of more of them misses the cache at each element
_ALIGNED = 64  # XLA takes a host buffer as a CPU array without a copy if it begins at a multiple of this
_QUIET = 3.0  # seconds until a load or a save shows its progress


def place(
    config: LlamaConfig, mesh: Mesh, dtype: str, read: Reader, rules: Rules = STORED, threads: int = THREADS
) -> Params:
    """Builds the sharded parameter tree from a reader of rows.

    Each row that this process's devices hold is read once, by several threads, and cast as it is copied into the
    stacked layout. Devices that hold the same part are given the same buffer.

    Args:
        dtype: of the result, "float32" or "bfloat16".
        read: called from several threads at once; rows come in whole heads.
        rules: how the parameters are laid out on the mesh.
        threads: more of them help where reading waits for a network.

    Raises:
        UserError: if the mesh does not divide the parameters.
    """
    check_divides(logical_axes(config), abstract(config, dtype), mesh, rules)
    shapes, axes = mapping.flat(abstract(config, dtype)), mapping.flat(logical_axes(config))
    targets = []
    for tensor in mapping.tensors(config):
        sharding = NamedSharding(mesh, spec(axes[tensor.path], rules))
        targets.append(_target(tensor, config, shapes[tensor.path], sharding))
    params: Params = {}
    total = sum(target.row_bytes * (stop - start) for target in targets for _, start, stop in target.jobs)
    with ThreadPoolExecutor(threads) as pool, megabytes("weights", total) as advance:
        for target in targets:
            node = params
            *above, name = target.tensor.path.split("/")
            for parent in above:
                node = node.setdefault(parent, {})
            node[name] = _array(target, config, read, pool, advance)
    return params


@dataclasses.dataclass(frozen=True)
class _Target:
    """One array to be made.

    Attributes:
        array: its shape and dtype.
        bounds_of: device of this process to what it holds.
        jobs: (layer, start, stop) of what is read, in values of the leading letter; together they are all that these
            devices hold, once.
        row_bytes: of the result, for one value of the leading letter.
    """

    tensor: Tensor
    array: jax.ShapeDtypeStruct
    sharding: NamedSharding
    bounds_of: Mapping[Any, Bounds]
    jobs: list[tuple[int, int, int]]
    row_bytes: int


def _target(tensor: Tensor, config: LlamaConfig, array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> _Target:
    places = sharding.addressable_devices_indices_map(array.shape)
    bounds_of = {device: _bounds(index, array.shape) for device, index in places.items()}
    letter, axis = _leading(tensor)
    spans: dict[int, set[Span]] = {}
    for bounds in bounds_of.values():
        for layer in range(*bounds[0]) if tensor.layered else (0,):
            spans.setdefault(layer, set()).add(bounds[tensor.layered + axis])
    size = mapping.sizes(config)
    row_bytes = math.prod(size[other] for other in tensor.ours if other != letter) * array.dtype.itemsize
    jobs = [(layer, *block) for layer in sorted(spans) for block in _blocks(spans[layer], row_bytes)]
    return _Target(tensor, array, sharding, bounds_of, jobs, row_bytes)


def _bounds(index: Any, shape: tuple[int, ...]) -> Bounds:
    return tuple(axis.indices(extent)[:2] for axis, extent in zip(index, shape, strict=True))


def _leading(tensor: Tensor) -> tuple[str, int]:
    """The letter by which the file's rows are cut, and its axis in our array (without L)."""
    return tensor.stored[0], tensor.ours.index(tensor.stored[0])


def _blocks(spans: set[Span], row_bytes: int) -> Iterator[Span]:
    """The union of some spans in blocks of at most `BLOCK_BYTES`, in order."""
    step, done = max(1, BLOCK_BYTES // row_bytes), 0
    for start, stop in sorted(spans):
        for low in range(max(start, done), stop, step):
            yield low, min(low + step, stop)
        done = max(done, stop)


def _array(
    target: _Target, config: LlamaConfig, read: Reader, pool: ThreadPoolExecutor, advance: Callable[[int], None]
) -> jax.Array:
    tensor, dtype = target.tensor, target.array.dtype
    buffers = {bounds: _aligned(bounds, dtype) for bounds in target.bounds_of.values()}
    rows = mapping.leading_rows(tensor, config)

    def fill(job: tuple[int, int, int]) -> int:
        layer, start, stop = job
        block = read(tensor, layer, slice(start * rows, stop * rows))
        parts = _of_layer(buffers, layer if tensor.layered else None)
        for low, high in _tiles(start, stop, rows):
            tile = block[(low - start) * rows : (high - start) * rows].astype(dtype, copy=False)
            ours = _bits(mapping.to_ours(tensor, config, tile))
            for part, there, here in _shared(tensor, parts, low, high):
                _bits(part)[there] = ours[here]
        return target.row_bytes * (stop - start)

    for count in pool.map(fill, target.jobs):
        advance(count)
    held = [jax.device_put(buffers[bounds], device) for device, bounds in target.bounds_of.items()]
    # Waited for, so that the buffers of one array are gone from the host before those of the next are made.
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(target.array.shape, target.sharding, held))


def _aligned(bounds: Bounds, dtype: Any) -> np.ndarray:
    shape = [stop - start for start, stop in bounds]
    count = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(count + _ALIGNED, np.uint8)
    skip = -raw.ctypes.data % _ALIGNED
    return raw[skip : skip + count].view(dtype).reshape(shape)


def _of_layer(parts: Mapping[Bounds, np.ndarray], layer: int | None) -> dict[Bounds, np.ndarray]:
    """The parts of one layer, without L; all of them for an array that has no layers."""
    if layer is None:
        return dict(parts)
    return {bounds[1:]: part[layer - bounds[0][0]] for bounds, part in parts.items() if layer in range(*bounds[0])}


def _tiles(start: int, stop: int, rows: int) -> Iterator[Span]:
    step = max(1, _TILE // rows)
    for low in range(start, stop, step):
        yield low, min(low + step, stop)


def _bits(array: np.ndarray) -> np.ndarray:
    """The same bytes as whole numbers, which numpy copies faster than bfloat16."""
    return array.view(f"u{array.dtype.itemsize}")


def _shared(
    tensor: Tensor, parts: Mapping[Bounds, np.ndarray], low: int, high: int
) -> Iterator[tuple[np.ndarray, tuple[slice, ...], tuple[slice, ...]]]:
    """For each part that holds values `low` to `high` of the leading letter: the part, where in it, and where in them."""
    axis = _leading(tensor)[1]
    for bounds, part in parts.items():
        first, last = max(low, bounds[axis][0]), min(high, bounds[axis][1])
        if first < last:
            there, here = [slice(None)] * len(bounds), [slice(*span) for span in bounds]
            there[axis] = slice(first - bounds[axis][0], last - bounds[axis][0])
            here[axis] = slice(first - low, last - low)
            yield part, tuple(there), tuple(here)


def gather(array: jax.Array, layer: int | None) -> dict[Bounds, np.ndarray]:
    """One layer of an array (or all of one that has no layers) in the host's memory, in the parts that devices hold.

    In a run of several processes all must call this, and each gets the whole. On a CPU nothing is copied.
    """
    part = array
    if not array.is_fully_addressable:
        part = array if layer is None else array[layer]
        whole = np.asarray(multihost_utils.process_allgather(part, tiled=True))
        return {tuple((0, extent) for extent in whole.shape): whole}
    if not _in_host_memory(array):
        # jax keeps what it copied to the host beside the array: of a layer or a copy it goes with them.
        part, layer = (jnp.copy(array) if layer is None else array[layer]), None
    shards = {_bounds(shard.index, part.shape): shard.data for shard in part.addressable_shards}
    return _of_layer({bounds: np.asarray(data) for bounds, data in shards.items()}, layer)


def _in_host_memory(array: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in array.sharding.device_set)


def stored_rows(
    tensor: Tensor, config: LlamaConfig, parts: Mapping[Bounds, np.ndarray], dtype: str, pool: ThreadPoolExecutor
) -> Iterator[np.ndarray]:
    """The file's tensor of one layer in blocks of rows, in order.

    Args:
        parts: from `gather`; which devices held them does not change the result.
        dtype: of the blocks; the cast rounds to nearest.
        pool: turns the next blocks meanwhile. One for all tensors: each new thread keeps memory of its own.
    """
    letter, _ = _leading(tensor)
    rows, shape = mapping.leading_rows(tensor, config), mapping.stored_shape(tensor, config)
    row_bytes = rows * math.prod(shape[1:]) * np.dtype(dtype).itemsize

    def turn(block: Span) -> np.ndarray:
        out = np.empty(((block[1] - block[0]) * rows, *shape[1:]), dtype)
        for low, high in _tiles(*block, rows):
            tile = out[(low - block[0]) * rows : (high - block[0]) * rows]
            ours = _bits(mapping.to_ours(tensor, config, tile))
            for part, there, here in _shared(tensor, parts, low, high):
                ours[here] = _bits(part[there].astype(dtype, copy=False))
        return out

    waiting: deque[Future[np.ndarray]] = deque()
    for block in _blocks({(0, mapping.sizes(config)[letter])}, row_bytes):
        waiting.append(pool.submit(turn, block))
        if len(waiting) > THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextlib.contextmanager
def megabytes(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress line in MB for work that takes more than a few seconds.

    Args:
        total: bytes.

    Yields:
        `advance(count)`: count bytes more are done.
    """
    mega, done, shown, start = 1_000_000, 0, 0, time.monotonic()
    with progress(name, -(-total // mega), "MB") as draw:

        def advance(count: int) -> None:
            nonlocal done, shown
            done += count
            now = -(-done // mega) if done >= total else done // mega
            if now > shown and (sys.stdout.isatty() or time.monotonic() - start > _QUIET):
                draw(now - shown)
                shown = now

        yield advance
