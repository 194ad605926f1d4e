"""What the benchmarks have in common: their options, the parts of the model in a compiler's words, how figures are handed over."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from selfreward_jax import workdir
from selfreward_jax.observe.progress import say

# The model's own scopes, innermost first: an instruction belongs to the first that its name holds.
SCOPES = ("rope", "attention_out", "attention", "qkv", "mlp", "head", "embed", "choose", "block")


def scope_of(instruction: str, otherwise: str = "other") -> str:
    """The part of the model that an instruction of a compiled program's text belongs to, by its `op_name`."""
    path = re.search(r'op_name="([^"]*)"', instruction)
    parts = path[1].split("/") if path else []
    return next((scope for scope in SCOPES if scope in parts), otherwise)


def problems(arguments: argparse.Namespace, counts: Sequence[str], lists: Mapping[str, Sequence[str]]) -> list[str]:
    """What is wrong with these options; the lists among them are read, into the order of what is known.

    Args:
        counts: options that are at least 1.
        lists: options that are words with commas between them, and the words that there are.
    """
    found = [f"--{name}={getattr(arguments, name)}: at least 1" for name in counts if getattr(arguments, name) < 1]
    for name, known in lists.items():
        asked = [word for word in getattr(arguments, name).split(",") if word]
        found += [f"--{name}: {word!r} is none of {', '.join(known)}" for word in asked if word not in known]
        setattr(arguments, name, [word for word in known if word in asked])
    return found


def hand_over(figures: dict[str, Any], out: str) -> None:
    """Writes figures to the file `out`, if one is named, and prints them as the last line."""
    if out:
        workdir.write_text(epath.Path(out), json.dumps(figures, indent=2) + "\n")
    say(json.dumps(figures))
