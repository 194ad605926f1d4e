"""Samples from a model: a file of prompts to a file of answers, or one prompt to the terminal.

python -m selfreward_jax.generate --model=demo --prompt "Why is the sky blue?"
python -m selfreward_jax.generate --model=runs/m3-demo/m3/model --prompts=questions.jsonl --out=answers.jsonl
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

from etils import epath

from selfreward_jax import contradictions
from selfreward_jax.data.token_bytes import stop_problems
from selfreward_jax.errors import UserError, spelled

_OPTIONS = {
    "--config.model.source": "--model",
    "--config.model.tokenizer=DIRECTORY or a hub name": "--model=DIRECTORY",  # it takes the model's own tokenizer only
    "--config.model.tokenizer": "--model",
    "--config.model.chat_template": "--chat_template",
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m selfreward_jax.generate", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument(
        "--model", required=True, help="demo, random:tiny, a gguf file, a Hugging Face folder or a hub name"
    )
    parser.add_argument("--prompt", default="", help="one prompt; the answers are printed")
    parser.add_argument(
        "--prompts", default="", help="file of rows with prompt, text, instruction or turns (and perhaps an id)"
    )
    parser.add_argument("--out", default="", help="jsonl file of answers")
    parser.add_argument("--samples", type=int, default=1, help="answers a prompt")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=0.9, help="nucleus mass; 1: no limit")
    parser.add_argument("--top_k", type=int, default=0, help="most tokens to choose from; 0: no limit")
    parser.add_argument(
        "--min_p", type=float, default=0.0, help="least share of the most probable token's probability; 0: no limit"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer, end of turn included")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="STRING", help="an answer ends before it; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random draws")
    parser.add_argument("--rows", type=int, default=32, help="answers that are decoded together")
    parser.add_argument("--chat_template", default="own", help="own, llama2, chatml or a Jinja file")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights and the computation"
    )
    return parser.parse_args()


def _check(arguments: argparse.Namespace) -> None:
    problems = []
    if bool(arguments.prompt) == bool(arguments.prompts):
        problems.append("give either --prompt or --prompts")
    if arguments.prompts and not arguments.out:
        problems.append("--prompts needs --out")
    for name in ("samples", "rows"):
        if getattr(arguments, name) < 1:
            problems.append(f"--{name}={getattr(arguments, name)}: at least 1")
    problems += [f"--{line}" for line in contradictions.sampling(arguments)]
    if not 0 <= arguments.seed < 2**32:
        problems.append(f"--seed={arguments.seed}: from 0 to 2**32 - 1")
    problems += stop_problems(arguments.stop)
    if problems:
        raise UserError(*problems)


def _check_out(name: str) -> epath.Path:
    """The file of answers; one that cannot be written is refused now, not when the answers are there."""
    from selfreward_jax import stores

    out = stores.place(name, "--out")
    remote = stores.is_remote(out)
    if out.is_dir() if not remote else "/" not in name.split("://")[1].strip("/"):
        raise UserError(f"--out={name}: a folder; name a file in it, such as {out / 'answers.jsonl'}")
    probe = out.parent / f".{out.name}.probe"
    stores.ask(out.parent)
    try:
        if not remote:
            out.parent.mkdir(parents=True, exist_ok=True)
        with stores.writing(probe) as write:
            write(b"\n")
        stores.remove(probe)
    except OSError as error:
        raise UserError(f"--out={name}: {error.strerror or error}; give a file in a folder you can write") from error
    return out


def _save(out: epath.Path, text: str) -> None:
    """Writes the answers; where `--out` no longer takes them (a full disk) they go to the system's temporary folder."""
    from selfreward_jax.workdir import write_text

    try:
        write_text(out, text)
    except UserError as error:
        reason = error.args[0].split(";")[0]
        try:
            with tempfile.NamedTemporaryFile("wb", prefix="answers-", suffix=".jsonl", delete=False) as file:
                file.write(text.encode())
        except OSError as also:
            said = f"{tempfile.gettempdir()} cannot take the answers either ({also.strerror or also})"
            raise UserError(f"{reason}; {said}: they are lost") from error
        raise UserError(f"{reason}; the answers are in {file.name}") from error


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    from selfreward_jax.data.seeds import prompt_texts

    out = _check_out(arguments.out) if arguments.out else None
    prompts = [("prompt", arguments.prompt)] if arguments.prompt else prompt_texts(arguments.prompts, "")
    from selfreward_jax.interactive import answer  # jax starts here: not before the arguments are right

    rows: list[dict[str, Any]] = []
    for row in answer(arguments, prompts):
        rows.append(row)
        if arguments.prompt:
            print(row["text"])
    if out is not None:
        from selfreward_jax.data.records import json_line

        _save(out, "".join(json_line(row) + "\n" for row in rows))


def main() -> int:
    """Returns the exit code: 0, or 2 for a user's mistake."""
    from selfreward_jax.cli import exit_code

    arguments = _arguments()

    def run() -> None:
        with spelled(_OPTIONS):
            _run(arguments)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
