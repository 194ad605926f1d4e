"""The multiple-choice judge prompt of Li et al. (paper A.2, Figure 7) in place of the additive one."""

from ml_collections import ConfigDict

from selfreward_jax import presets

# Judge examples in this prompt are longer: 589 to 671 tokens of the demo model, 1,013 to 1,113 of the tiny one.
_LONGEST = {"demo": 704, "random:tiny": 1152}


def get_config(preset: str = "") -> ConfigDict:
    config = presets.get("m3", preset)
    config.judge.template = "multiple_choice"
    config.judge.low = 1
    config.data.max_length = _LONGEST.get(config.model.source, config.data.max_length)
    return config
