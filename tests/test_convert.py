"""`python -m selfreward_jax.convert`: any source to a Hugging Face directory."""

import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from selfreward_jax import convert


def run(*arguments):
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "selfreward_jax.convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_command_writes_a_model_and_says_so(tmp_path):
    done = run("--source=random:tiny", f"--out={tmp_path / 'm'}", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {tmp_path / 'm'}: ")
    assert "MB, weights in bfloat16, in " in done.stdout
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}


def test_keep_keeps_the_bytes(tmp_path, capsys):
    for dtype in ("bfloat16", "float32"):
        first, second = tmp_path / dtype, tmp_path / f"{dtype}-again"
        assert convert.main(["--source=random:tiny", f"--out={first}", f"--dtype={dtype}"]) == 0
        assert convert.main([f"--source={first}", f"--out={second}"]) == 0
        for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
            assert (first / name).read_bytes() == (second / name).read_bytes()
        assert f"weights in {dtype}" in capsys.readouterr().out
    assert np.dtype("float32") in {tensor.dtype for tensor in load_file(second / "model.safetensors").values()}


def test_mistakes_are_lines_and_exit_code_2(tmp_path, capsys):
    assert convert.main(["--source=nowhere.gguf", f"--out={tmp_path / 'm'}"]) == 2
    said = capsys.readouterr()
    assert said.err == "error: --source: no gguf file at nowhere.gguf\n"
    assert said.out == ""
    with pytest.raises(SystemExit) as caught:
        convert.main(["--source=demo", "--out=x", "--dtype=int8"])
    assert caught.value.code == 2
