"""The multiple-choice judge prompt of Li et al. (paper A.2, Figure 7) in place of the additive one."""

from ml_collections import ConfigDict

from selfreward_jax import presets


def get_config(preset: str = "") -> ConfigDict:
    config = presets.get("m3", preset)
    config.judge.template = "multiple_choice"
    config.judge.low = 1
    return config
