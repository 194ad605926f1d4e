"""Prints what a run has made so far: counts, drop reasons, histograms and whole examples of any artifact.

python -m selfreward_jax.inspect runs/m3-demo
python -m selfreward_jax.inspect runs/m3-demo m2/pairs --examples=5
python -m selfreward_jax.inspect runs/m3-demo --id=pool-00000-003
"""

from __future__ import annotations

import argparse
import io
import os
import sys

from selfreward_jax import stores
from selfreward_jax.errors import UserError
from selfreward_jax.observe import artifacts, views
from selfreward_jax.observe.figures import show


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m selfreward_jax.inspect", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("workdir", help="the run's folder; a run in progress may be looked at")
    parser.add_argument(
        "artifact", nargs="?", default="", help="m2/pairs, prompts, ... or a path; without: an overview"
    )
    parser.add_argument("--examples", type=int, default=3, help="whole examples to show")
    parser.add_argument("--seed", type=int, default=0, help="which examples are drawn")
    parser.add_argument("--id", default="", help="one prompt with its candidates, judgments and pair")
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> None:
    if arguments.examples < 0:
        raise UserError(f"--examples={arguments.examples}: not below 0")
    root = stores.place(arguments.workdir, "workdir")
    stores.ask(root)
    look = artifacts.open_look(root)
    one = artifacts.choose(look, arguments.artifact) if arguments.artifact else None
    if arguments.id:
        lines = views.of_prompt(look, arguments.id, one.name if one else "")
    elif one:
        lines = views.of_artifact(look, one, arguments.examples, arguments.seed)
    else:
        lines = views.of_run(look)
    show([*lines, *views.damaged(look)])


def main() -> int:
    """Returns the exit code: 0, or 2 for a user's mistake."""
    from selfreward_jax.cli import exit_code

    arguments = _arguments()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # texts hold what a terminal's encoding may lack
    try:
        code = exit_code(lambda: _run(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough; the interpreter flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
