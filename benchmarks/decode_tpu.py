"""A decode step of Llama-2 70B on a TPU slice as its compiler sees it: memory, and a time modelled from its own cycle estimates.

Nothing runs on a TPU: the engine's program (`sampling.decode.advance`) is compiled for a named topology, which needs
libtpu and no device. The memory is what the compiler allocates. The time is **compiler-modelled, not measured**: the
sum of `estimated_cycles` of all instructions of one step, the layers' loop counted once a layer, over an assumed clock.
All-reduces are not in it. The bound is the reading of weights and keys at the memory's rated bandwidth.

    JAX_PLATFORMS=cpu TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5litepod-8 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \\
        TPU_LOG_DIR=disabled python -m benchmarks.decode_tpu --out=benchmarks/results/decode_tpu.json

The last line is one JSON object.
"""

import argparse
import collections
import math
import re
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.figures import hand_over, scope_of
from selfreward_jax.cli import exit_code
from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.observe.progress import say
from selfreward_jax.sampling import decode
from selfreward_jax.sampling.tokens import Sampling
from selfreward_jax.sharding.mesh import AXES
from selfreward_jax.sharding.rules import LAYOUTS, spec

LLAMA2_70B = LlamaConfig(
    vocab_size=32000, embed=8192, layers=80, q_heads=64, kv_heads=8, head_dim=128, ffn=28672, context=4096, tied=False
)
# chip: (assumed clock in GHz, memory bandwidth in GB/s), of v5p and v6e
CHIPS = {"v5p": (1.75, 2765), "v6e": (1.75, 1640), "v5e": (1.5, 819)}


def compiled(topology: str, tensor: int, slots: int, samples: int, prompt: int, new: int) -> tuple[Any, dict[str, int]]:
    """The engine's program for a slice, and the bytes on a device of the weights and of the caches."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    if len(devices) % tensor:
        raise UserError(f"--tensor={tensor}: {topology} has {len(devices)} devices")
    mesh = jax.make_mesh(
        (len(devices) // tensor, 1, tensor), AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices
    )
    config, rules = LLAMA2_70B, LAYOUTS["generation"][0]
    compute = llama.Compute("bfloat16", remat="none", layout="generation")
    program = decode.Program(config, compute, Sampling(0.7, 0.9, max_new_tokens=new), config.vocab_size)

    def there(array: Any, place: P | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, place or P()))

    axes = llama.logical_axes(config)
    params = jax.tree.map(lambda a, names: there(a, spec(names, rules)), llama.abstract(config, "bfloat16"), axes)
    params = llama.heads_apart(params, lambda a, form: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=form))
    number, table = (there(jax.ShapeDtypeStruct(*one)) for one in (((), "uint32"), ((2, config.vocab_size), "uint8")))
    inputs = decode.Inputs(params, number, number, (), table)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda params: decode.blank(program, params, slots, samples, prompt), params)
        held = jax.tree.map(lambda a: there(a, a.sharding.spec if a.sharding else P()), shapes)
        steps = [there(jax.ShapeDtypeStruct((), "int32"))] * 4
        lowered = decode.advance.lower(program, inputs, held, slots * samples, *steps)
        made = lowered.compile(compiler_options={"xla_tpu_offload_gather_to_sparsecore": "false"})

    def on_device(tree: Any) -> int:
        return sum(
            math.prod(_split(a).shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
        )

    keys = {"caches": on_device((held.prompts, held.own)), "weights": on_device(params)}
    return made, keys | {"embedding": on_device(params["embed"])}


def _split(array: Any) -> NamedSharding:
    return getattr(array.sharding, "sharding", array.sharding)  # a Format holds one


def cycles(program: str) -> tuple[dict[str, float], int]:
    """Estimated cycles of one decode step by kind of instruction, and how many all-reduces it has.

    The outermost loop is the steps', counted once; in it a loop with a constant bound runs as often as that says.
    """
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            name = head[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def trips(condition: str) -> int:
        bounds = [int(n) for line in bodies[condition] for n in re.findall(r"s32\[\][^=]* constant\((\d+)\)", line)]
        return max(bounds, default=1)

    found: collections.Counter[str] = collections.Counter()
    reduces = 0

    def walk(body: str, times: int) -> None:
        nonlocal reduces
        for line in bodies[body]:
            if taken := re.search(r'"estimated_cycles":"(\d+)"', line):
                found[scope_of(line)] += int(taken[1]) * times
            reduces += times * bool(re.search(r" all-reduce(-start)?\(", line))
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                walk(loop[2], times * trips(loop[1]))

    steps = next(
        (loop[1] for line in bodies[_entry(program)] if (loop := re.search(r" while\(.*body=%?([\w.\-]+)", line))), ""
    )
    walk(steps, 1)
    return dict(found), reduces


def _entry(program: str) -> str:
    found = re.search(r"^ENTRY %?([\w.\-]+)", program, re.MULTILINE)
    assert found
    return found[1]


def model(arguments: argparse.Namespace, samples: int) -> dict[str, Any]:
    """The figures of one way to hold the rows: so many samples of each prompt."""
    began = time.perf_counter()
    made, held = compiled(
        arguments.topology, arguments.tensor, arguments.rows // samples, samples, arguments.prompt,
        arguments.context - arguments.prompt,
    )  # fmt: skip
    taken = time.perf_counter() - began
    clock, bandwidth = CHIPS[arguments.topology.split(":")[0]]
    by_part, reduces = cycles(made.as_text())
    memory = made.memory_analysis()
    reading = held["weights"] - held["embedding"] + held["caches"]  # of the embedding only rows are read
    return {
        "samples": samples, "compile_seconds": round(taken, 1),
        "cache_gb": round(held["caches"] / 1e9, 3), "weights_gb": round(held["weights"] / 1e9, 3),
        "temp_gb": round(memory.temp_size_in_bytes / 1e9, 4), "temp_share_of_cache": round(memory.temp_size_in_bytes / held["caches"], 5),
        "aliased_gb": round(memory.alias_size_in_bytes / 1e9, 3),
        "modelled_ms": round(sum(by_part.values()) / clock / 1e6, 2), "bound_ms": round(reading / bandwidth / 1e6, 2),
        "by_part_ms": {name: round(count / clock / 1e6, 2) for name, count in sorted(by_part.items(), key=lambda item: -item[1])},
        "all_reduces_not_in_it": reduces,
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Compiles each way, prints a line each and the JSON."""
    if arguments.topology.split(":")[0] not in CHIPS:
        raise UserError(f"--topology={arguments.topology}: a chip of {', '.join(CHIPS)}, as in v5p:2x2x2")
    jax.config.update("jax_platforms", "cpu")
    found = []
    for samples in (1, 4):
        found.append(model(arguments, samples))
        one = found[-1]
        say(
            f"{samples} samples a prompt: {one['modelled_ms']} ms a step (compiler-modelled), bound {one['bound_ms']} ms,"
            f" temporary memory {one['temp_share_of_cache']:.2%} of {one['cache_gb']} GB of keys; {one['by_part_ms']}"
        )
    asked = {name: getattr(arguments, name) for name in ("topology", "tensor", "rows", "context", "prompt")}
    figures = {"compiler_modelled": found, "settings": asked, "jax": jax.__version__}
    hand_over(figures, arguments.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--topology", default="v5p:2x2x2", help="chip and shape (default %(default)s)")
    option("--tensor", type=int, default=8, help="devices that heads and ffn are cut over (default %(default)s)")
    option("--rows", type=int, default=64, help="completions that are decoded together (default %(default)s)")
    option("--context", type=int, default=4096, help="tokens of a prompt and its completion (default %(default)s)")
    option("--prompt", type=int, default=2048, help="of them, the prompt's (default %(default)s)")
    option("--out", default="", help="a file for the last line too")
    return exit_code(lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
