"""What the tests share: eight virtual devices, meshes of them, and random parameters."""

import os
from importlib.metadata import version

# Before jax is imported. Compiling is most of the time of a test: the old emitters and level 0 take a seventh of it.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # 0.11 has no such flag, and an unknown one ends the process
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import sys  # noqa: E402
import threading  # noqa: E402
from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The first example of a property compiles; and a run of the tests is the same every time.
settings.register_profile("selfreward", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("selfreward")


@cache
def _mesh(shape):
    import jax  # in functions: tests of plain Python do not wait for it
    from jax.sharding import AxisType

    from selfreward_jax.sharding.mesh import AXES

    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)


@pytest.fixture(scope="session")
def mesh_of():
    """`mesh_of((data, fsdp, tensor))`: a mesh over the first devices; enter it with `jax.set_mesh`."""
    return _mesh


@pytest.fixture
def mesh(request):
    """The mesh that the test runs in: one device, or `indirect` parameters (data, fsdp, tensor)."""
    import jax

    made = _mesh(getattr(request, "param", (1, 1, 1)))
    with jax.set_mesh(made):
        yield made


@pytest.fixture(scope="session")
def small():
    """A Llama with every size different, two layers and grouped queries; the odd sizes need one device."""
    from selfreward_jax.model.config import LlamaConfig

    return LlamaConfig(
        vocab_size=41, embed=12, layers=2, q_heads=4, kv_heads=2, head_dim=6, ffn=20, context=64, rope_theta=100.0
    )


@pytest.fixture(scope="session")
def even():
    """A small Llama whose sizes all mesh axes of two divide."""
    from selfreward_jax.model.config import LlamaConfig

    return LlamaConfig(
        vocab_size=40, embed=16, layers=2, q_heads=4, kv_heads=2, head_dim=6, ffn=24, context=64, rope_theta=100.0
    )


@pytest.fixture(scope="session")
def random_params():
    """`random_params(config, mesh, seed=0)`: every array random (norm scales and biases too), as it is stored."""
    import jax

    from selfreward_jax.model import llama
    from selfreward_jax.sharding.rules import shardings

    def make(config, mesh, seed=0):
        rng = np.random.default_rng(seed)

        def one(path, array):
            values = rng.normal(0, 0.3, array.shape).astype(np.float32)
            return 1 + values if path[-1].key == "scale" else values

        tree = jax.tree_util.tree_map_with_path(one, llama.abstract(config))
        return jax.device_put(tree, shardings(llama.logical_axes(config), mesh))

    return make


@pytest.fixture
def bucket(monkeypatch):
    """What gs:// is for this test: `objects` by name without gs://, what was `asked`, `published`, `cancelled`.

    Set `fault` to a function of ("list", "read" or "upload", the object's name) that raises or waits, and `conditional`
    to False for a store that creates objects where there is one already.
    """
    from etils.epath.backend import fsspec_backend
    from fake_bucket import Bucket
    from fsspec.registry import _registry

    state = SimpleNamespace(objects={}, asked=[], published=[], removed=[], cancelled=[], lock=threading.Lock())
    state.fault, state.conditional = (lambda what, path: None), True
    here = type("Bucket", (Bucket,), {"state": state})
    for protocol in here.protocol:
        monkeypatch.setitem(_registry, protocol, here)
    fsspec_backend._get_filesystem.cache_clear()
    yield state
    fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture(scope="session")
def rows_apart():
    """`rows_apart(rows, count, time, mesh)`: a batch whose first rows hold a sequence each, in their order."""

    from selfreward_jax.data import packing
    from selfreward_jax.sharding.place import place
    from selfreward_jax.training.logprobs import Batch

    def make(rows, count, time, mesh):
        part = packing.Microbatch(time, [[i] for i in range(len(rows))], sum(len(row.tokens) for row in rows), 0)
        laid = packing.lay([[row] for row in rows], part, packing.Shape(time, count, 1, False))
        return Batch(*(place(getattr(laid, field), mesh) for field in Batch._fields))

    return make


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets what was compiled once it takes half of the memory maps that Linux gives a process (65,530): LLVM makes some
    for each program, and the process dies at the one that it cannot make."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 32_000:
        sys.modules["jax"].clear_caches()
