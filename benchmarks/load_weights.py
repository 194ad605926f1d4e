"""Memory and time of loading and saving a Hugging Face checkpoint of several gigabytes on eight virtual CPU devices.

The checkpoint is made up: bfloat16 tensors of random finite numbers under the names and shapes of a Llama, written by the
safetensors library in several files with an index. A process of its own loads it on a mesh of data 1 x fsdp 4 x
tensor 2 and saves it; its peak resident memory (VmHWM of /proc, so Linux only) is compared with what it held just
before and with the bytes of the arrays:

    peak_over_bytes       (peak of the load - resident before the load - bytes of the arrays) / bytes of the arrays
    save_peak_over_bytes  (peak of the save - resident before the save) / bytes of the arrays
    whole_over_bytes      (peak of the load - bytes of the arrays) / bytes of the arrays: Python and JAX count too

Then every tensor of the saved files is compared with the made-up ones, bit for bit. With `--store` both directories
lie at gs:// names, behind an fsspec file system that reads ranges and uploads parts like an object store's.

    python -m benchmarks.load_weights --out benchmarks/results/load_weights.json
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from ml_dtypes import bfloat16
from safetensors import safe_open
from safetensors.numpy import save_file

from benchmarks import pinned
from benchmarks.figures import hand_over

MESH = (1, 4, 2)
FILE_BYTES = 400e6  # of the made-up checkpoint: the maker holds one file's tensors
SAVED_BYTES = 1.5e9  # of a saved file at most, so that there are several and an index
VOCABULARY, EMBED, FFN, HEADS, KV_HEADS, HEAD = 32_768, 2048, 8192, 16, 8, 128
FINITE = np.uint16(0xBFFF)  # without the first bit of the exponent there is no infinity and no NaN
BUCKET = "gs://benchmark"


def shapes(layers: int) -> dict[str, tuple[int, int] | tuple[int]]:
    """Names and shapes of a Llama's tensors, as transformers saves them."""
    found: dict[str, Any] = {"model.embed_tokens.weight": (VOCABULARY, EMBED), "lm_head.weight": (VOCABULARY, EMBED)}
    found["model.norm.weight"] = (EMBED,)
    for layer in range(layers):
        here = f"model.layers.{layer}."
        found |= {
            here + "input_layernorm.weight": (EMBED,),
            here + "post_attention_layernorm.weight": (EMBED,),
            here + "self_attn.q_proj.weight": (HEADS * HEAD, EMBED),
            here + "self_attn.k_proj.weight": (KV_HEADS * HEAD, EMBED),
            here + "self_attn.v_proj.weight": (KV_HEADS * HEAD, EMBED),
            here + "self_attn.o_proj.weight": (EMBED, HEADS * HEAD),
            here + "mlp.gate_proj.weight": (FFN, EMBED),
            here + "mlp.up_proj.weight": (FFN, EMBED),
            here + "mlp.down_proj.weight": (EMBED, FFN),
        }
    return found


def layers_for(gigabytes: float) -> int:
    """The fewest layers with which a checkpoint has this size."""
    count = lambda layers: 2 * sum(int(np.prod(shape)) for shape in shapes(layers).values())  # noqa: E731
    fixed, each = count(0), count(1) - count(0)
    return max(1, -int((fixed - gigabytes * 1e9) // each))


def make_checkpoint(folder: Path, layers: int) -> None:
    """Writes config.json and the files, holding one file's tensors at a time."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": EMBED,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, name))
        held.clear()

    for name, shape in shapes(layers).items():
        held[name] = (rng.integers(0, 2**16, shape, np.uint16) & FINITE).view(bfloat16)
        if sum(tensor.nbytes for tensor in held.values()) > FILE_BYTES:
            flush()
    if held:
        flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class _Upload(AbstractBufferedFile):
    """Parts go to a file beside the object's; it gets the object's name with the last one."""

    def _initiate_upload(self) -> None:
        self.target = self.fs.local(self.path)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.parts = open(self.target.with_suffix(".upload"), "wb")  # noqa: SIM115

    def _upload_chunk(self, final: bool = False) -> None:
        self.parts.write(self.buffer.getbuffer())
        if final:
            self.parts.close()
            self.target.with_suffix(".upload").replace(self.target)


class Store(AbstractFileSystem):
    """A local folder at gs:// names: no renames, no maps; ranges and uploads only."""

    protocol = ("gcs", "gs")
    root = Path()

    def local(self, path: str) -> Path:
        return self.root / str(self._strip_protocol(path))

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        found = [self._about(file) for file in self.local(path).iterdir()]
        return found if detail else [one["name"] for one in found]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return self._about(self.local(path))

    def _about(self, file: Path) -> dict[str, Any]:
        kind = "directory" if file.is_dir() else "file"
        return {"name": str(file.relative_to(self.root)), "size": file.stat().st_size, "type": kind}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        with open(self.local(path), "rb") as file:
            file.seek(start or 0)
            return file.read() if end is None else file.read(end - (start or 0))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> _Upload:
        return _Upload(self, path, mode, block_size=options.get("block_size") or "default")

    def rm_file(self, path: str) -> None:
        self.local(path).unlink()


def measure(source: str, target: str, dtype: str) -> dict[str, Any]:
    """Loads and saves in this process, which has done nothing else."""
    import jax
    from etils import epath

    from selfreward_jax.model.config import from_hf
    from selfreward_jax.sharding.mesh import make_mesh
    from selfreward_jax.weights import safetensors_io

    config = from_hf(json.loads((epath.Path(source) / "config.json").read_text()), source)
    mesh = make_mesh(*MESH)
    with jax.set_mesh(mesh):
        jax.numpy.ones(8).block_until_ready()  # the backend's own memory is not the load's
        pinned.forget_peak()
        before, start, cpu = pinned.memory("VmRSS"), time.monotonic(), time.process_time()
        params = safetensors_io.load(source, config, mesh, dtype)
        seconds, cpu, peak = time.monotonic() - start, time.process_time() - cpu, pinned.memory("VmHWM")
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        pinned.forget_peak()
        before_save, start, save_cpu = pinned.memory("VmRSS"), time.monotonic(), time.process_time()
        safetensors_io.save(params, config, target, "bfloat16", SAVED_BYTES)
        save_seconds, save_cpu = time.monotonic() - start, time.process_time() - save_cpu
        save_peak = pinned.memory("VmHWM")
    return {
        "bytes": size,
        "peak_over_bytes": round((peak - before - size) / size, 4),
        "whole_over_bytes": round((peak - size) / size, 4),
        "seconds": round(seconds, 1),
        "save_peak_over_bytes": round((save_peak - before_save) / size, 4),
        "save_seconds": round(save_seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "save_cpu_seconds": round(save_cpu, 1),
        "dtype": dtype,
        "mesh": list(MESH),
        "jax": jax.__version__,
    }


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name to file, from what the files hold."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    return found


def equal(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    maps = [_weight_map(folder) for folder in (first, second)]
    if maps[0].keys() != maps[1].keys():
        return False
    for name in maps[0]:
        tensors = []
        for folder, names in zip((first, second), maps, strict=True):
            with safe_open(folder / names[name], framework="np") as file:
                tensors.append(file.get_tensor(name))
        if tensors[0].dtype != tensors[1].dtype or not np.array_equal(*(one.view(np.uint16) for one in tensors)):
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.2, help="of the checkpoint (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the arrays")
    parser.add_argument("--store", action="store_true", help="read and write through an object store's interface")
    parser.add_argument("--dir", default=None, help="where the files lie meanwhile, twice their size; then removed")
    parser.add_argument("--out", default="", help="a file for the last line too")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not pinned.memory("VmHWM"):
        parser.error("this system does not say how much memory a process has held (VmHWM of /proc): use Linux")
    if arguments.measure:
        root = Path(arguments.measure)
        source, target = str(root / "source"), str(root / "saved")
        if arguments.store:
            Store.root = root
            for protocol in Store.protocol:
                fsspec.register_implementation(protocol, Store, clobber=True)
            source, target = f"{BUCKET}/source", f"{BUCKET}/saved"
        print(json.dumps(measure(source, target, arguments.dtype)), flush=True)
        return 0
    root = Path(tempfile.mkdtemp(prefix="load_weights_", dir=arguments.dir))
    try:
        files = root / BUCKET.split("//")[1] if arguments.store else root
        make_checkpoint(files / "source", layers_for(arguments.gigabytes))
        command = [sys.executable, "-m", "benchmarks.load_weights", f"--measure={root}", f"--dtype={arguments.dtype}"]
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
        ran = subprocess.run(
            command + ["--store"] * arguments.store, env=environment, check=False, stdout=subprocess.PIPE, text=True
        )
        if ran.returncode:
            print(f"the measured process ended with {ran.returncode}", file=sys.stderr)
            return 1
        *said, last = ran.stdout.splitlines()
        print("\n".join(said), flush=True)
        figures = json.loads(last) | {
            "store": "fsspec, ranges and uploads" if arguments.store else "local disk",
            "file_bytes": sum(file.stat().st_size for file in (files / "source").iterdir()),
            "largest_saved_file": max(file.stat().st_size for file in (files / "saved").iterdir()),
            "saved_equal": equal(files / "source", files / "saved"),
        }
    finally:
        shutil.rmtree(root)
    hand_over(figures, arguments.out)
    return 0 if figures["saved_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
