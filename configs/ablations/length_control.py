"""Length control (Wu et al. 2024): among near-equal answers the shortest is chosen and the longest rejected."""

from ml_collections import ConfigDict

from selfreward_jax import presets


def get_config(preset: str = "") -> ConfigDict:
    config = presets.get("m3", preset)
    config.aift.length_control = (0.1,)
    return config
