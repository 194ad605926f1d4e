"""IFT-only (paper A.3): no judge data, so M1 is the SFT baseline; judges that hardly parse leave few pairs."""

from ml_collections import ConfigDict

from selfreward_jax import presets


def get_config(preset: str = "") -> ConfigDict:
    config = presets.get("m3", preset)
    config.eft.source = "none"
    return config
