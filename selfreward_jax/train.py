"""Trains a model on your own data by SFT or DPO, without the loop.

python -m selfreward_jax.train --loss=sft --model=demo --data=instructions.jsonl --workdir=runs/mine
python -m selfreward_jax.train --loss=dpo --model=runs/mine/trained/model --data=preferences.parquet --workdir=runs/mine-dpo
"""

from __future__ import annotations

import argparse
import sys

from selfreward_jax import cli
from selfreward_jax.config import Config
from selfreward_jax.errors import UserError, spelled
from selfreward_jax.observe.progress import say

_SET_HERE = {"sft": "data.ift", "dpo": "data.preferences"}  # the field that --data stands for, by loss


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m selfreward_jax.train", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--loss", required=True, choices=("sft", "dpo"), help="what the rows are for")
    parser.add_argument(
        "--data", required=True,
        help="jsonl, json or parquet file, or a hub name (owner/name or owner/name:split). SFT: messages, Alpaca, ShareGPT or"
        " prompt and response rows; DPO: prompt, chosen, rejected",
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="demo, a gguf file, a Hugging Face folder or a hub name")
    parser.add_argument("--workdir", default="runs/trained", help="the result's folder; trained/model is for people")
    parser.add_argument(
        "--config", default="configs/sft.py:demo",
        help="config file with :PRESET, whose hyperparameters are used; any field by --config.NAME=VALUE",
    )  # fmt: skip
    parser.add_argument(
        "--resume", choices=("strict", "override"), default="strict", help="override: go on with a changed config"
    )
    cli.add_place(parser)
    return cli.split(parser, argv)


def _run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from selfreward_jax import config

    raw = cli.parse_config(arguments.config, overrides)
    set_here = _SET_HERE[arguments.loss]
    taken = [word for word in overrides if word.startswith((f"--config.{set_here}=", "--config.model.source="))]
    if taken:
        raise UserError(*(f"{word}: --data and --model name it here" for word in taken))
    raw.data[set_here.removeprefix("data.")] = arguments.data
    raw.model.source = arguments.model
    if not any(word.startswith("--config.model.parameters=") for word in overrides):
        raw.model.parameters = 0  # the preset's model has another size: the source tells
    with spelled({"--config.model.source": "--model", f"--config.{set_here}": "--data"}):
        _train(arguments, config.from_config_dict(raw))


def _train(arguments: argparse.Namespace, checked: Config) -> None:
    root = cli.folder(arguments.workdir)
    from selfreward_jax import launch  # jax starts here: not before the config is right

    launch.join(checked, arguments)
    launch.train(checked, arguments.loss, root, arguments.resume)
    say(f"{root / 'trained' / 'model'}")


def main() -> int:
    """Returns the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    arguments, overrides = _arguments(sys.argv[1:])
    return cli.exit_code(lambda: _run(arguments, overrides))


if __name__ == "__main__":
    sys.exit(main())
