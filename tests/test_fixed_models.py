"""A judge or prompt writer that is another model than the run's: what is chosen for its own shapes."""

import dataclasses

import jax
import pytest
from etils import epath

from selfreward_jax import loaded
from selfreward_jax.config import Config, JudgeConfig, ModelConfig
from selfreward_jax.data.chat import load_chat
from selfreward_jax.model import kernels
from selfreward_jax.run import Run
from selfreward_jax.weights.source import open_source


@pytest.mark.parametrize(
    ("head_dim", "form", "line"),
    [
        (32, "splash", ""),
        (10, "mapped", "model.attention=splash: splash takes head sizes up to 64 that are multiples of 16, not 10; mapped is used instead\n"),
    ],
)  # fmt: skip
def test_its_attention_is_chosen_for_its_own_heads(mesh, head_dim, form, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(kernels.NEEDS, "splash", kernels.Needs("cpu", ("float32",), 16, 64))
    monkeypatch.setattr(kernels, "refusal", lambda *about: "")
    source = open_source("random:tiny")
    judge = dataclasses.replace(source, config=dataclasses.replace(source.config, head_dim=head_dim))
    monkeypatch.setattr(loaded, "open_fixed", lambda name, option: judge)
    config = Config(
        model=ModelConfig(source="random:tiny", compute_dtype="float32", attention="splash"), judge=JudgeConfig(model="judge")
    )
    chat = load_chat(source.tokenizer, "own", source.eos_ids)
    run = Run(config, epath.Path(tmp_path), "splash", mesh, mesh, source, chat)
    with jax.set_mesh(mesh):
        engine, _ = loaded.judge_model(run, "m1")
    assert engine.compute.attention == engine.decode_compute.attention == form
    assert run.attention == "splash" and engine.config.head_dim == head_dim
    assert capsys.readouterr().out == (
        f"{line}--config.judge.model=judge: attention {form}, generation mesh data 1 x fsdp 1 x tensor 1\n"
    )
