"""From a checked config to a running recipe: compile cache, lock, host check, mesh, model and tokenizer."""

from __future__ import annotations

import argparse
import os

import jax
from etils import epath

from selfreward_jax import estimate, recipe, workdir
from selfreward_jax.config import Config, flat, free_fields
from selfreward_jax.data.chat import load_chat
from selfreward_jax.model import llama
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run
from selfreward_jax.sharding.mesh import make_mesh
from selfreward_jax.sharding.rules import check_divides
from selfreward_jax.weights.fetch import cache_folder
from selfreward_jax.weights.source import open_source


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs between processes; by default beside the demo model in the user's cache folder."""
    path = folder or os.fspath(cache_folder() / "compiled")
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def open_run(config: Config, root: epath.Path, mesh: jax.sharding.Mesh) -> Run:
    """Opens tokenizer and model description; weights are read when a stage asks for them."""
    source = open_source(config.model.source, config.model.tokenizer or None)
    check_divides(llama.logical_axes(source.config), llama.abstract(source.config), mesh)
    estimate.check_host(config, root, source.config.parameter_count())
    return Run(config, root, mesh, source, load_chat(source.tokenizer, config.model.chat_template, source.eos_ids))


def start(config: Config, root: epath.Path, arguments: argparse.Namespace) -> None:
    """Runs (or, for --dry_run, describes) the recipe of a config in a folder."""
    recipe.check_stop(config, arguments.stop_after)
    if config.model.parameters and not arguments.dry_run:
        estimate.check_host(config, root, config.model.parameters)
    if arguments.dry_run:
        parameters = config.model.parameters or open_source(config.model.source).config.parameter_count()
        names = [stage.name for stage in recipe.stages(config)]
        print("\n".join(estimate.table(config, root, names, parameters)))
        return
    use_compilation_cache(config.engine.cache)
    with workdir.locked(root):
        workdir.check_config(root, flat(config), free_fields(), arguments.resume == "override")
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        say(f"workdir {root}; {jax.device_count()} {jax.devices()[0].platform} device(s), mesh {shape}")
        with jax.set_mesh(mesh):
            recipe.build(config, root, lambda: open_run(config, root, mesh), arguments.stop_after)
