"""Builds M2; `--config=configs/m2.py:PRESET`, no preset is the paper's Llama 2 70B."""

from ml_collections import ConfigDict

from selfreward_jax import presets


def get_config(preset: str = "") -> ConfigDict:
    return presets.get("m2", preset)
