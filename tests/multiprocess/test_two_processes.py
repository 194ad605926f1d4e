"""Pieces of the program in two processes: hosts that differ decide alike, and heads cut between them sample the same."""

import json
import os
import subprocess
import sys

import numpy as np
from ports import free_port

HEAD = """
import json, sys
process, count, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
from selfreward_jax import processes
if count > 1:
    processes.start(processes.Place(f"127.0.0.1:{port}", count, process), {})
"""
TAIL = """
open(f"{out}/{process}.json", "w").write(json.dumps(found))
"""


def job(program, count, folder):
    """What each process of a job with two devices a process has found, and what each printed."""
    port = str(free_port())
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", HEAD + program + TAIL, str(process), str(count), port, str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(count)
    ]  # fmt: skip
    said = []
    try:
        for process in running:
            said.append(process.communicate(timeout=300)[0])
            assert process.returncode == 0, said
    finally:
        for process in running:
            process.kill()
    return [json.loads((folder / f"{process}.json").read_text()) for process in range(count)], said


DIFFERING = """
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
"""


def test_the_smallest_memory_and_the_pickiest_host_decide_for_all(tmp_path):
    (first, second), said = job(DIFFERING, 2, tmp_path)
    assert first == second
    # Half of a device's memory for weights: two pieces, where the larger host alone would take a copy a device.
    assert first == {"mesh 0": [2, 1, 2], "mesh 1": [2, 1, 2], "form 0": "mapped", "form 1": "mapped", "form": "splash"}
    assert "model.attention=splash: no such chip; mapped is used instead" in said[0]
    assert "model.attention=splash: splash does not compile on the host of process 1; mapped" in said[0]


SAMPLING = """
import jax
from etils import epath
from selfreward_jax import loaded
from selfreward_jax.config import Config, EngineConfig, ModelConfig
from selfreward_jax.data.chat import load_chat
from selfreward_jax.run import Run
from selfreward_jax.sampling.engine import Request, run as sample
from selfreward_jax.sampling.tokens import Sampling
from selfreward_jax.sharding.mesh import make_mesh, regrouped
from selfreward_jax.weights.source import open_source

sizes = (1, count, 2) if count > 1 else (2, 1, 1)  # query heads over fsdp, which lies between the processes
mesh = make_mesh(1, -1, 1)
grouped = regrouped(mesh, sizes)
source = open_source("random:tiny")
config = Config(model=ModelConfig(source="random:tiny", compute_dtype="float32"), engine=EngineConfig(rows=6, pad=8))
chat = load_chat(source.tokenizer, "own", source.eos_ids)
with jax.set_mesh(mesh):
    engine = loaded.engine(Run(config, epath.Path(out), "mapped", mesh, grouped, source, chat), "m0")
    requests = [Request(tuple(range(5, 9 + 3 * i)), (2 * i, 2 * i + 1)) for i in range(3)]
    ((_, completions, _),) = sample(engine, Sampling(0.8, 0.95, 12, config.engine.window), requests, 3, "test")
q = engine.params["layers"]["attention"]["q"]
found = {"heads": q.addressable_shards[0].data.shape[2], "of": q.shape[2]}
found["ids"] = [one.ids for some in completions for one in some]
found["logprobs"] = [one.logprobs for some in completions for one in some]
"""


def test_heads_that_are_cut_between_processes_sample_the_same(tmp_path):
    (alone,), _ = job(SAMPLING, 1, tmp_path)
    (first, second), _ = job(SAMPLING, 2, tmp_path)
    assert first == second
    assert (alone["heads"], first["heads"], first["of"]) == (4, 1, 4)
    assert first["ids"] == alone["ids"] and len({tuple(ids) for ids in first["ids"]}) == 6
    for here, there in zip(first["logprobs"], alone["logprobs"], strict=True):
        np.testing.assert_allclose(here, there, atol=1e-4)
