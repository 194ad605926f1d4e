"""What a record says of the program that made it."""

import json

import jax

from selfreward_jax.config import Config, flat
from selfreward_jax.made_by import made_by


def test_versions_devices_flags_and_config_are_there_and_no_key_is(monkeypatch):
    devices = jax.devices()  # jax reads its flags now
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_x=1")
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "SELFREWARD_API_KEY"):
        monkeypatch.setenv(name, "secret-of-mine")
    found = made_by(flat(Config()))
    assert found["versions"]["jax"] == jax.__version__
    assert {"python", "selfreward-jax", "optax", "orbax-checkpoint"} <= set(found["versions"])
    assert found["devices"] == f"{len(devices)} cpu: cpu"
    assert found["processes"] == 1
    assert found["flags"]["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"
    assert found["flags"]["LIBTPU_INIT_ARGS"] == "--xla_tpu_x=1"
    assert "secret-of-mine" not in json.dumps(found)


def test_the_hash_is_of_every_field():
    fields = flat(Config())
    other = fields | {"dpo.beta": fields["dpo.beta"] * 2}
    assert made_by(fields)["config"] == made_by(dict(reversed(fields.items())))["config"] != made_by(other)["config"]
