"""Command lines: `--config=FILE:PRESET --config.field=value`, and errors as lines with exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from selfreward_jax import processes, signals, stores
from selfreward_jax.config import from_config_dict
from selfreward_jax.errors import UserError


def exit_code(command: Callable[[], Any]) -> int:
    """Runs a command and gives its exit code.

    A user's mistake is printed line by line, without a traceback, and gives 2; Ctrl-C gives 130 and SIGTERM 143. An error
    that one process of several has alone ends it here: the others, which wait for it, hear no more signs of life and end.
    """
    with signals.signals() as asked:
        try:
            _check_devices(os.environ)
            command()
            return 0
        except (Exception, KeyboardInterrupt) as error:
            if asked.number or isinstance(error, KeyboardInterrupt):  # then other errors are of others that ended
                code, lines = 128 + (asked.number or signal.SIGINT), ["", signals.LINE + processes.of_job()]
            elif isinstance(error, UserError):
                code, lines = 2, _lines(error)
            elif processes.count() == 1:
                raise
            else:
                code, lines = 1, traceback.format_exc().splitlines()
                lines.append(f"error: {type(error).__name__}{processes.of_job()}; the others end too")
            with contextlib.suppress(OSError):  # nobody may read any more
                sys.stdout.flush()
                sys.stderr.write("".join(f"{line}\n" for line in lines))
            if processes.count() > 1 and not getattr(error, "shared", False):
                processes.leave(code)
            return code


def _lines(error: UserError) -> list[str]:
    """What this process says of a mistake: process 0 says what all know, any other what it knows alone."""
    if error.shared and processes.index():
        return []
    where = "" if error.shared else processes.of_job()
    return [f"error: {line}{where}" for line in str(error).splitlines()]


def _check_devices(environment: Mapping[str, str]) -> None:
    """jax reads it when it is imported, and ends in a traceback."""
    value = environment.get("JAX_NUM_CPU_DEVICES", "1")
    if not re.fullmatch(r"[0-9]*[1-9][0-9]*|-1", value):
        raise UserError(f"JAX_NUM_CPU_DEVICES={value}: a whole number from 1, or unset it for one device")


def split(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The parser's own arguments, and the overrides `--config.NAME=VALUE`; anything else ends the program with 2."""
    known, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if not word.startswith("--config.")]
    if unknown:
        parser.error(f"unknown arguments {unknown}; config fields are --config.NAME=VALUE")
    return known, rest


def add_place(parser: argparse.ArgumentParser) -> None:
    """Options for several processes: which of them this is."""
    found = "TPU slices, Slurm, Open MPI and Kubernetes say it: docs/scaling.md"
    group = parser.add_argument_group(f"several processes ({found})")
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=int, default=0, help="how many there are")
    group.add_argument("--process_id", type=int, default=-1, help="which one this is, from 0")
    group.add_argument(
        "--join_timeout", type=int, default=300, help="seconds that they wait for each other at the start"
    )
    group.add_argument(
        "--heartbeat_timeout", type=int, default=60, help="seconds without a sign of life after which one is dead"
    )


def folder(workdir: str) -> epath.Path:
    """The workdir that an option names; a local one is absolute, as checkpoints need it.

    Raises:
        UserError: if it is on no store that is known, or a file is in the way.
    """
    path = stores.place(workdir, "--workdir")
    if stores.is_remote(path):
        return path
    path = epath.Path(os.path.abspath(path))
    there = next(one for one in (path, *path.parents) if os.path.lexists(one))
    if not os.path.isdir(there):
        raise UserError(f"--workdir={workdir}: {there} is a file, a folder is needed; take another name")
    return path


def parse_config(config_file: str, overrides: Sequence[str]) -> ConfigDict:
    """Loads a config file (`path.py:preset`) and applies overrides of the form `--config.a.b=value`.

    Raises:
        UserError: for a file that can't be loaded, and one line for each override that names no field or has a value
            of the wrong type, and for each contradiction among the rest; all at once.
    """
    base = _load(config_file)
    good, problems, wrong = [], [], []
    for override in overrides:
        problem = _problem(base, override)
        if problem:
            problems.append(f"{override}: {problem}")
            wrong.append(_name(override))
        else:
            good.append(override)
    config = _apply(base, good)
    if problems:
        try:
            from_config_dict(config, wrong)
        except UserError as error:
            problems += error.args
        raise UserError(*problems)
    return config


def _load(config_file: str) -> ConfigDict:
    path, colon, preset = config_file.partition(":")
    name = f"--config={config_file}"
    try:
        spec = importlib.util.spec_from_file_location("_config_file", path)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{name}: it has no function get_config(preset)")
        made = module.get_config(*([preset] if colon else []))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{name}: no such config file; configs/m3.py:demo is one") from error
    except Exception as error:  # a config file is the user's program: any mistake in it is one line
        line = getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
        raise UserError(f"{name}: {type(error).__name__} on line {line}: {error}".replace("\n", " ")) from error
    if not isinstance(made, ConfigDict):
        raise UserError(f"{name}: get_config() gave a {type(made).__name__}, a ConfigDict is needed")
    return made


def _name(override: str) -> str:
    return override.split("=")[0].removeprefix("--config.")


def _problem(base: ConfigDict, override: str) -> str:
    """What speaks against one override, or ""."""
    there: Any = base
    for part in _name(override).split("."):
        if not isinstance(there, ConfigDict) or part not in there:
            return "no field of the config; `python -m selfreward_jax.main --fields` lists them"
        there = there[part]
    if isinstance(there, ConfigDict):
        return f"a group of fields; name one of them: {', '.join(there)}"
    try:
        _apply(base, [override])
    except (flags.Error, TypeError, ValueError) as error:
        return f"the value is of the wrong type ({str(error).strip().splitlines()[0]})"
    return ""


def _apply(base: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    values = flags.FlagValues()
    argv = ["main", *overrides]
    config_flags.DEFINE_config_dict("config", ConfigDict(base.to_dict()), flag_values=values, sys_argv=argv)
    values(argv)
    return values.config
