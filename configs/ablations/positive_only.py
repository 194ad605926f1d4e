"""Positive-only (paper A.4): no pairs; answers with a perfect mean score (demo: 3 or more) join IFT and EFT, SFT from M0."""

from ml_collections import ConfigDict

from selfreward_jax import presets


def get_config(preset: str = "") -> ConfigDict:
    config = presets.get("m3", preset)
    config.aift.method = "positives"
    if config.model.source in ("demo", "random:tiny"):
        config.aift.positive_score = 3.0  # measured: 0 and 1 of 64 candidates of the demo have a mean of 5
    return config
