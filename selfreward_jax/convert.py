"""Writes any model that can be opened as a Hugging Face directory: `python -m selfreward_jax.convert --help`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import jax

from selfreward_jax import stores
from selfreward_jax.cli import exit_code
from selfreward_jax.errors import spelled
from selfreward_jax.sharding.mesh import make_mesh
from selfreward_jax.weights.export import export
from selfreward_jax.weights.source import load_params, open_source, stored_dtype


def convert(source: str, out: str, dtype: str, tokenizer: str | None = None) -> str:
    """Opens a model, loads it and writes it.

    Args:
        source, tokenizer: see `weights.source.open_source`.
        out: the directory to write; an earlier export there is replaced.
        dtype: "float32", "bfloat16", or "keep": as stored (float32 for gguf files, whose values it holds exactly).

    Returns:
        a line that says what was written.
    """
    start = time.monotonic()
    stores.ask(stores.place(out, "--out"))  # now, not when all is loaded
    opened = open_source(source, tokenizer)
    kind = stored_dtype(opened) if dtype == "keep" else dtype
    mesh = make_mesh(-1, 1, 1)
    with jax.set_mesh(mesh):
        params = load_params(opened, mesh, kind)
        card = f"# {opened.name}\n\nConverted to safetensors ({kind}) with selfreward_jax from {opened.name}."
        folder = export(
            params,
            opened.config,
            opened.tokenizer,
            out,
            kind,
            card,
            generation=opened.generation,
            licence=opened.licence,
            base_model=opened.name,
        )
    size = sum(file.stat().length for file in folder.iterdir())
    return f"wrote {folder}: {size / 1e6:.1f} MB, weights in {kind}, in {time.monotonic() - start:.1f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m selfreward_jax.convert", description=__doc__)
    parser.add_argument("--source", required=True, help="demo, random:tiny, FILE.gguf, a directory, or a hub name")
    parser.add_argument("--out", required=True, help="the directory to write")
    parser.add_argument("--dtype", default="keep", choices=("float32", "bfloat16", "keep"))
    parser.add_argument("--tokenizer", default=None, help="a directory or hub name, if not the model's own")
    given = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # a conversion computes nothing: leave the accelerator alone

    def run() -> None:
        with spelled({"--config.model.source": "--source", "--config.model.tokenizer": "--tokenizer"}):
            print(convert(given.source, given.out, given.dtype, given.tokenizer))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
