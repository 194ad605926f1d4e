"""Hosts of one job that differ, in memory or in what they compile: all processes decide alike, for the weakest."""

import json
import os
import subprocess
import sys

from ports import free_port

PROGRAM = """
import json, sys
process, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
from selfreward_jax import processes
processes.start(processes.Place(f"127.0.0.1:{port}", 2, process), {})
from selfreward_jax import loaded
from selfreward_jax.config import MeshConfig
from selfreward_jax.model import kernels
from selfreward_jax.sharding import choose
from selfreward_jax.sharding.mesh import make_mesh
from selfreward_jax.weights.source import open_source, param_bytes

source, mesh, found = open_source("random:tiny"), make_mesh(1, 4, 1), {}
need = 4 * param_bytes(source, "float32")  # of a job whose devices, four, each hold the model
for small in (0, 1):
    choose.memory_here = lambda: need if process == small else 100 * need
    found[f"mesh {small}"] = list(loaded.generation_mesh(MeshConfig(), source, "float32", mesh).shape.values())
    kernels.NEEDS["splash"] = kernels.Needs("cpu", ("float32",), 1, 256)  # a kernel that this platform may have
    kernels.refusal = lambda *about: "no such chip" if process == small else ""
    found[f"form {small}"] = loaded.attention_form("splash", source.config, "float32")
kernels.refusal = lambda *about: ""
found["form"] = loaded.attention_form("splash", source.config, "float32")
open(f"{out}/{process}.json", "w").write(json.dumps(found))
"""


def test_the_smallest_memory_and_the_pickiest_host_decide_for_all(tmp_path):
    port = str(free_port())
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(process), port, str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    said = []
    try:
        for process in running:
            said.append(process.communicate(timeout=300)[0])
            assert process.returncode == 0, said
    finally:
        for process in running:
            process.kill()
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2))
    assert first == second
    # Half of a device's memory for weights: two pieces, where the larger host alone would take a copy a device.
    assert first == {"mesh 0": [2, 1, 2], "mesh 1": [2, 1, 2], "form 0": "mapped", "form 1": "mapped", "form": "splash"}
    assert "model.attention=splash: no such chip; mapped is used instead" in said[0]
    assert "model.attention=splash: splash does not compile on the host of process 1; mapped" in said[0]
