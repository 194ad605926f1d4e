"""Two processes with two devices each: each reads the rows of its own shards, and the first writes for both."""

import json
import os
import subprocess
import sys

import pytest
from ports import free_port

from selfreward_jax.weights import safetensors_io

PROGRAM = """
import contextlib, errno, json, sys
import jax, numpy as np
process, port, source, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
from selfreward_jax import processes, stores
processes.start(processes.Place(f"127.0.0.1:{port}", 2, process), {})
from jax.sharding import AxisType
from selfreward_jax.errors import UserError
from selfreward_jax.model.config import from_hf
from selfreward_jax.weights import safetensors_io, stacked
from selfreward_jax.weights.export import export
from selfreward_jax.weights.source import tiny_tokenizer

asked, ranges = [], stores.ranges

@contextlib.contextmanager
def counted(path):
    with ranges(path) as read:
        yield lambda start, count: (asked.append(count), read(start, count))[1]

stores.ranges = counted
config = from_hf(json.loads(open(source + "/config.json").read()))
report = {}
for shape in ((1, 1, 4), (1, 2, 2)):
    asked.clear()
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh):
        params = safetensors_io.load(source, config, mesh, "float32")
        report[str(shape)] = sum(asked[1:])  # the header is the first
        safetensors_io.save(params, config, f"{out}/{shape[1]}", "float32", max_shard_bytes=50_000)
    report["devices"] = len(jax.tree.leaves(params)[0].addressable_shards)

# The disk of process 0 fills up in the middle of an export: both hear of it, and can go on.
rows, turned = stacked.stored_rows, []

def full(*arguments):
    turned.append(1)
    if len(turned) > 5:
        raise OSError(errno.ENOSPC, "No space left on device")
    return rows(*arguments)

stacked.stored_rows = full
report["lines"] = []
for folder in (f"{out}/model", f"{out}/file"):
    if folder.endswith("file") and process == 0:
        open(folder, "w").write("no directory")
    try:
        with jax.set_mesh(mesh):
            export(params, config, tiny_tokenizer(), folder, "float32", "")
    except UserError as error:
        report["lines"].append(str(error))
open(f"{out}/{process}.json", "w").write(json.dumps(report))
"""


@pytest.mark.slow
def test_two_processes_load_and_save(checkpoint, mesh_of, tmp_path):
    saved, port = checkpoint("llama2"), str(free_port())
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(process), port, str(saved.folder), str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        for process in running:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said
    finally:
        for process in running:
            process.kill()
    reports = [json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2)]
    params = safetensors_io.load(saved.folder, saved.config, mesh_of((1, 1, 1)), "float32")
    names = safetensors_io.save(params, saved.config, tmp_path / "one", "float32", max_shard_bytes=50_000)
    for folder in ("1", "2"):
        assert sorted(file.name for file in (tmp_path / folder).iterdir()) == sorted(names)
        for name in names:
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    config, whole = saved.config, 4 * saved.config.parameter_count()
    norms = (2 * config.layers + 1) * config.embed
    # Rows of the output and down projections are cut over fsdp, all others over tensor; norms are whole everywhere.
    turned = config.layers * config.embed * (config.q_heads * config.head_dim + config.ffn)
    assert not list(tmp_path.glob("*model*"))
    for report in reports:
        assert report["devices"] == 2
        full, foreign = report["lines"]
        assert "model: the model cannot be written ([Errno 28] No space left on device); nothing was left" in full
        assert "a file stands where the model's directory should be" in foreign
        assert report["(1, 1, 4)"] == 4 * ((whole // 4 - turned - norms) // 2 + turned + norms)
        assert report["(1, 2, 2)"] == whole - 4 * turned // 2
