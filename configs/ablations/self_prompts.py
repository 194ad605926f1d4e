"""Self-generated prompts (paper A.5): M(t) itself writes the new prompts of its iteration."""

from ml_collections import ConfigDict

from selfreward_jax import presets


def get_config(preset: str = "") -> ConfigDict:
    config = presets.get("m3", preset)
    config.prompts.model = "current"
    return config
