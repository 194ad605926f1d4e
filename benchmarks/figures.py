"""What the benchmarks have in common: the parts of the model in a compiler's words, and how figures are handed over."""

import json
import re
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


def hand_over(figures: dict[str, Any], out: str) -> None:
    """Writes figures to the file `out`, if one is named, and prints them as the last line."""
    if out:
        workdir.write_text(epath.Path(out), json.dumps(figures, indent=2) + "\n")
    say(json.dumps(figures))
