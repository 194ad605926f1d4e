"""A judge that is fixed in advance (Xu et al. 2023): rewards by `judge.model`, here M0's own source, not by M(t)."""

from ml_collections import ConfigDict

from selfreward_jax import presets


def get_config(preset: str = "") -> ConfigDict:
    config = presets.get("m3", preset)
    config.judge.model = config.model.source
    return config
