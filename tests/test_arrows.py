"""The arrows of the architecture: who may import whom, and which file alone knows a library."""

import ast
import graphlib
from pathlib import Path

import pytest

import selfreward_jax

NAME = "selfreward_jax"
PACKAGE = Path(selfreward_jax.__file__).parent

# A module imports its own layer and those before it. A package or module that is in no layer fails the test.
LAYERS = (
    (
        "errors", "contradictions", "config", "presets", "cli", "cluster", "rendezvous", "processes", "signals", "stores", "workdir", "lock",
        "observe", "data", "judging", "self_instruct", "made_by", "heap",
    ),
    ("sharding",),
    ("model",),
    ("weights",),
    ("training", "sampling"),
    ("evaluation",),
    ("run",),
    ("loaded",),
    ("stages",),
    ("recipe", "estimate"),
    ("launch",),
    ("main", "generate", "interactive", "convert", "train", "inspect"),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

# A library, and the only places that import it: a package ("weights") or one file ("training.checkpoint").
ONLY = {
    "orbax": ("training.checkpoint",),
    "flax": ("model",),
    "transformers": ("weights", "data.chat"),
    "tokenizers": ("weights", "data.chat"),
    "datasets": ("data.seeds",),
    "gguf": ("weights.gguf_io",),
    "safetensors": ("weights",),
    "huggingface_hub": ("weights.fetch",),
    "optax": ("training",),
    "grain": ("data.batches",),
    "jax.experimental.pallas": ("model.kernels",),
    "tokamax": ("model.kernels",),
    "jax_triton": ("model.kernels",),
    "triton": ("model.kernels",),
    "rich": ("observe",),
    "absl": ("cli",),
}
# No code from files, and no torch at run time.
NEVER = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch", "tensorflow")
# Packages that need no accelerator.
WITHOUT = {"judging": ("jax", "flax", "optax", "orbax"), "self_instruct": ("jax", "flax", "optax", "orbax")}
# Neighbours in a layer that know nothing of each other.
APART = {("training", "sampling"), ("sampling", "training")}


def package():
    """Module name inside the package ("stages.pairs") -> source."""
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        out[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return out


def imports(text):
    """Every name that a module imports, with what is imported from it: `from a import b` gives "a" and "a.b"."""
    out = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide their target from this test"
            out |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return out


def inside(name, place):
    return name == place or name.startswith(f"{place}.")


def own(names):
    """The imports of the package itself, without its name."""
    return {name.removeprefix(f"{NAME}.") for name in names if inside(name, NAME)} - {NAME}


def problems(modules):
    """What breaks the rules, a line each."""
    out = []
    for module, text in modules.items():
        part = module.split(".")[0]
        found = imports(text)
        if part not in RANK and module != "__init__":
            out.append(f"{module}: in no layer")
            continue
        for name in own(found):
            other = name.split(".")[0]
            if RANK.get(other, -1) > RANK.get(part, -1):
                out.append(f"{module} imports {name}: against the arrows")
            if (part, other) in APART:
                out.append(f"{module} imports {name}: {part} and {other} know nothing of each other")
            if part == other == "stages":
                out.append(f"{module} imports {name}: stages never import each other")
        for library, places in ONLY.items():
            if any(inside(name, library) for name in found) and not any(inside(module, place) for place in places):
                out.append(f"{module} imports {library}: only {' and '.join(places)} may")
        for library in (*NEVER, *WITHOUT.get(part, ())):
            if any(inside(name, library) for name in found):
                out.append(f"{module} imports {library}: never here")
        out += [f"{module}: {line}" for line in dangers(text)]
    return sorted(set(out))


def dangers(text):
    """Code that runs what came from a file."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "compile", "__import__"):
            yield f"{node.func.id}() on line {node.lineno}"
        for keyword in node.keywords:
            given = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and not given:
                yield f"{keyword.arg} on line {node.lineno}"


def test_the_package_keeps_the_arrows():
    assert problems(package()) == []


def test_no_module_imports_itself_by_way_of_others():
    modules = package()
    graph = {
        module: {name for name in own(imports(text)) if name in modules and name != module}
        for module, text in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def test_every_layer_is_there():
    there = {module.split(".")[0] for module in package()}
    assert set(RANK) <= there, "a layer that no longer exists belongs out of LAYERS"


@pytest.mark.parametrize(
    ("module", "text", "says"),
    [
        ("data.new", "from selfreward_jax.model import llama", "against the arrows"),
        ("training.new", "from selfreward_jax.evaluation import judge", "against the arrows"),
        ("training.new", "def f():\n    import selfreward_jax.evaluation.judge", "against the arrows"),
        ("evaluation.new", "from selfreward_jax.run import Run", "against the arrows"),
        ("stages.new", "from selfreward_jax import recipe", "against the arrows"),
        ("recipe", "from selfreward_jax.launch import start", "against the arrows"),
        ("training.new", "from selfreward_jax.sampling.tokens import Sampling", "know nothing of each other"),
        ("stages.new", "from selfreward_jax.stages import pairs", "stages never import each other"),
        ("stages.new", "from selfreward_jax.stages.pairs import make", "stages never import each other"),
        ("stages.new", "import orbax.checkpoint as ocp", "only training.checkpoint may"),
        ("training.trainer", "from orbax import checkpoint", "only training.checkpoint may"),
        ("run", "from flax import nnx", "only model may"),
        ("data.records", "from transformers import AutoTokenizer", "only weights and data.chat may"),
        ("model.llama", "from jax.experimental import pallas as pl", "only model.kernels may"),
        ("model.llama", "import jax.experimental.pallas.tpu", "only model.kernels may"),
        ("data.oasst", "import datasets", "only data.seeds may"),
        ("judging.new", "import jax.numpy as jnp", "never here"),
        ("self_instruct.new", "from jax import jit", "never here"),
        ("weights.new", "import pickle", "never here"),
        ("weights.new", "from torch import load", "never here"),
        ("weights.new", "eval('1')", "eval() on line 1"),
        ("weights.new", "load(name, trust_remote_code=True)", "trust_remote_code on line 1"),
        ("weights.new", "numpy.load(name, allow_pickle=flag)", "allow_pickle on line 1"),
        ("tools.new", "", "in no layer"),
    ],
)
def test_what_breaks_a_rule_is_found(module, text, says):
    found = problems({module: text})
    assert found
    for line in found:
        assert line.startswith(module)
        assert line.endswith(says)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("stages.new", "from selfreward_jax.run import Run\nfrom selfreward_jax.evaluation import judge"),
        ("training.new", "from selfreward_jax.data import batches\nimport optax"),
        ("model.kernels", "from jax.experimental import pallas"),
        ("weights.new", "load(name, trust_remote_code=False)\nmodel.eval()"),
        ("stages.new", "import re\nre.compile('x')"),
    ],
)
def test_what_keeps_the_rules_is_let_pass(module, text):
    assert problems({module: text}) == []
