"""Command lines: `--config=FILE:PRESET --config.field=value`, and errors as lines with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from selfreward_jax.errors import UserError


def exit_code(command: Callable[[], Any]) -> int:
    """Runs a command. A user's mistake is printed line by line, without a traceback, and gives 2; Ctrl-C gives 130."""
    try:
        command()
    except UserError as error:
        sys.stdout.flush()
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; start again to go on from here", file=sys.stderr)
        return 130
    return 0


def parse_config(config_file: str, overrides: Sequence[str]) -> ConfigDict:
    """Loads a config file (`path.py:preset`) and applies overrides of the form `--config.a.b=value`.

    Raises:
        UserError: for a file that can't be loaded, and one line for each override that names no field or has a value
            of the wrong type; all at once.
    """
    _load(config_file, [])
    problems = []
    for override in overrides:
        try:
            _load(config_file, [override])
        except UserError as error:
            problems += list(error.args)
    if problems:
        raise UserError(*problems)
    return _load(config_file, overrides)


def _load(config_file: str, overrides: Sequence[str]) -> ConfigDict:
    values = flags.FlagValues()
    argv = ["main", f"--config={config_file}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    name = overrides[0] if overrides else f"--config={config_file}"
    try:
        values(argv)
        return values.config
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
        raise UserError(f"{name}: {_reason(error, name)}") from error


def _reason(error: BaseException, name: str) -> str:
    if name.startswith("--config."):
        field = name.split("=")[0].removeprefix("--")
        if isinstance(error, flags.UnrecognizedFlagError | AttributeError | KeyError):
            return f"{field} is no field of the config; `python -m selfreward_jax.main --fields` lists them"
        return f"the value is of the wrong type ({str(error).strip().splitlines()[0]})"
    if isinstance(error, OSError) or "Unable to open" in str(error):
        return "no such config file; configs/m3.py:demo is one"
    return str(error).strip().splitlines()[-1]
