"""A judge that does not improve with the iterations, as in Xu et al. (2023): M1 judges for every later model."""

from ml_collections import ConfigDict

from selfreward_jax import presets


def get_config(preset: str = "") -> ConfigDict:
    config = presets.get("m3", preset)
    config.judge.model = "m1"
    return config
