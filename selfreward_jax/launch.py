"""From a checked config to a running recipe: compile cache, lock, host check, mesh, model and tokenizer."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from selfreward_jax import estimate, loaded, lock, processes, recipe, stores, workdir
from selfreward_jax.config import OWN_JUDGES, Config, flat, free_fields
from selfreward_jax.data.chat import Chat, load_chat
from selfreward_jax.data.seeds import evaluation_texts, judge_rows, prompt_texts
from selfreward_jax.errors import UserError
from selfreward_jax.judging import templates
from selfreward_jax.judging.endpoint import open_endpoint
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run
from selfreward_jax.sharding.mesh import make_mesh
from selfreward_jax.stages.seed import check_files
from selfreward_jax.weights.fetch import cache_folder
from selfreward_jax.weights.source import Source, open_source


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs between processes; by default beside the demo model in the user's cache folder.

    Raises:
        UserError: if the folder that is named cannot be written.
    """
    path = folder and os.fspath(stores.place(folder, "--config.engine.cache"))
    if path and not stores.is_remote(path):
        try:
            os.makedirs(path, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            advice = "take a folder that can be written, or leave it empty"
            raise UserError(f"--config.engine.cache={folder}: {error.strerror or error}; {advice}") from error
    path = path or os.fspath(cache_folder() / "compiled")
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def open_run(config: Config, root: epath.Path) -> Run:
    """Opens tokenizer and model description; weights are read when a stage asks for them. All processes must call this."""
    source, chat = processes.each(lambda: _described(config, root))
    mesh, grouped = processes.each(lambda: _meshes(config, source))
    form = loaded.attention_form(config.model.attention, source.config, config.model.compute_dtype)
    run = Run(config, root, form, mesh, grouped, source, chat)
    loaded.describe(run)
    return run


def _described(config: Config, root: epath.Path) -> tuple[Source, Chat]:
    source = open_source(config.model.source, config.model.tokenizer or None)
    estimate.check_host(config, root, source.config.parameter_count())
    return source, load_chat(source.tokenizer, config.model.chat_template, source.eos_ids)


def _meshes(config: Config, source: Source) -> tuple[Mesh, Mesh]:
    """The training and the generation mesh; where the first is wrong the second is looked at all the same."""
    try:
        mesh = loaded.training_mesh(config, source.config)
    except UserError as error:
        devices = make_mesh(-1, 1, 1)
        try:
            loaded.generation_mesh(config.generation_mesh, source, config.model.compute_dtype, devices)
        except UserError as also:
            raise UserError(*error.args, *also.args) from error
        raise
    return mesh, loaded.generation_mesh(config.generation_mesh, source, config.model.compute_dtype, mesh)


def check_inputs(config: Config, root: epath.Path) -> None:
    """Reads what the user named and only a late stage needs: now, not after hours of training.

    Raises:
        UserError: all that is wrong with the judge prompt, the endpoint, and files of seed data, prompts and judge examples.
    """
    problems: list[str] = []

    def attempt(read: Callable[..., Any], *arguments: Any) -> None:
        try:
            read(*arguments)
        except UserError as error:
            problems.extend(error.args)

    if not workdir.is_done(root, "seed/split"):  # after it nothing reads them: they may be gone when a run goes on
        attempt(check_files, config.data)
    judge = config.judge
    attempt(templates.load, judge.template, judge.low, judge.high)
    if judge.endpoint_model:
        attempt(open_endpoint, judge.model, judge.endpoint_model)
    if config.eft.file:
        attempt(judge_rows, config.eft.file, judge.low, judge.high)
    if config.prompts.source != "self_instruct":
        attempt(prompt_texts, config.prompts.source, "")
    if config.data.validation:
        attempt(prompt_texts, config.data.validation, "")
    for file in config.prompts.avoid:
        attempt(evaluation_texts, file)
    if problems:
        raise UserError(*problems)


def check_models(config: Config) -> None:
    """Opens the fixed judge and the fixed writer of prompts: a name that is wrong, or a gate that is closed."""
    judge, writer = config.judge.model, config.prompts.model
    if judge not in ("", *OWN_JUDGES, config.model.source) and not config.judge.endpoint_model:
        loaded.open_fixed(judge, "--config.judge.model")
    if config.prompts.source == "self_instruct" and writer not in ("", "current", config.model.source):
        loaded.open_fixed(writer, "--config.prompts.model")


def join(config: Config, arguments: argparse.Namespace) -> None:
    """Joins the job's other processes, if there are any, as the command line says (`cli.add_place`)."""
    place = processes.Place(
        arguments.coordinator, arguments.num_processes, arguments.process_id, arguments.join_timeout,
        arguments.heartbeat_timeout,
    )  # fmt: skip
    given = {f"--{name}": getattr(arguments, name, "") for name in ("stop_after", "resume", "heartbeat_timeout")}
    given |= {f"--config.{name}": value for name, value in flat(config).items()}
    processes.start(place, {"jax": jax.__version__, **{name: str(value) for name, value in given.items()}})


def start(config: Config, root: epath.Path, arguments: argparse.Namespace) -> None:
    """Runs (or, for --dry_run, describes) the recipe of a config in a folder."""
    plan = recipe.stages(config)
    recipe.check_stop(plan, arguments.stop_after)
    processes.together(lambda: stores.ask(root))
    processes.each(lambda: check_inputs(config, root))
    if config.model.parameters and not arguments.dry_run:
        processes.each(lambda: estimate.check_host(config, root, config.model.parameters))
    if arguments.dry_run:
        parameters = config.model.parameters or open_source(config.model.source).config.parameter_count()
        print("\n".join(estimate.table(config, root, [stage.name for stage in plan], parameters)))
        return
    if config.target not in ("sft", "m1"):
        processes.each(lambda: check_models(config))
    with _working(config, root, arguments.resume) as open_here:
        recipe.build_loop(config, root, open_here, arguments.stop_after)


def train(config: Config, loss: str, root: epath.Path, resume: str) -> None:
    """Trains on people's own data, without the loop: `recipe.own_stages`."""
    config = dataclasses.replace(config, target="sft")  # one model, for the check of this host's disk
    if config.model.parameters:
        processes.each(lambda: estimate.check_host(config, root, config.model.parameters))
    with _working(config, root, resume) as open_here:
        recipe.build(recipe.own_stages(config, loss), config, root, open_here)


@contextlib.contextmanager
def _working(config: Config, root: epath.Path, resume: str) -> Iterator[Callable[[], Run]]:
    """The folder locked and its config checked; gives what opens the run and sets its mesh."""
    processes.each(lambda: use_compilation_cache(config.engine.cache))
    with lock.locked(root):
        workdir.check_config(root, flat(config), free_fields(), resume == "override")
        job = f" of {processes.count()} processes" if processes.count() > 1 else ""
        say(f"workdir {root}; {jax.device_count()} {jax.devices()[0].platform} device(s){job}")
        with contextlib.ExitStack() as while_open:

            def open_here() -> Run:
                run = open_run(config, root)
                while_open.enter_context(jax.set_mesh(run.mesh))
                return run

            yield open_here
