"""Builds a model of the sequence: `python -m selfreward_jax.main --config=configs/m3.py:demo --workdir=runs/demo`."""

from __future__ import annotations

import argparse
import os
import sys

from selfreward_jax import cli


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m selfreward_jax.main", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config", default="configs/m2.py", help="config file, with :PRESET; any field by --config.NAME=VALUE"
    )
    parser.add_argument("--workdir", default="", help="the run's folder; by default runs/ and the config's name")
    parser.add_argument(
        "--dry_run", action="store_true", help="list the stages, generations, time and bytes, and stop"
    )
    parser.add_argument("--stop_after", default="", metavar="STAGE", help="stop after this stage, e.g. m2/responses")
    parser.add_argument(
        "--resume", choices=("strict", "override"), default="strict", help="override: go on with a changed config"
    )
    parser.add_argument("--fields", action="store_true", help="list every config field with its default and source")
    cli.add_place(parser)
    return cli.split(parser, argv)


def _run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from selfreward_jax import config as configs

    if arguments.fields:
        print("\n".join(configs.describe()))
        return
    config = configs.from_config_dict(cli.parse_config(arguments.config, overrides))
    name = os.path.basename(arguments.config).replace(".py", "").replace(":", "-")
    root = cli.folder(arguments.workdir or f"runs/{name}")
    from selfreward_jax import launch  # jax starts here: not before the config is right

    if not arguments.dry_run:
        launch.join(config, arguments)
    launch.start(config, root, arguments)


def main() -> int:
    """Returns the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    arguments, overrides = _arguments(sys.argv[1:])
    return cli.exit_code(lambda: _run(arguments, overrides))


if __name__ == "__main__":
    sys.exit(main())
