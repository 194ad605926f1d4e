"""Small random checkpoints of every supported kind, saved by transformers, and our logits of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS = {
    "llama2": ("Llama", {**SMALL, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama31": ("Llama", {**SMALL, "head_dim": 12, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {**SMALL, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**SMALL, "tie_word_embeddings": True}),
    "biased": ("Llama", {**SMALL, "attention_bias": True, "mlp_bias": True}),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(kind, dtype="float32", max_shard_size="1GB")`: folder, config and the torch model in it."""
    torch = pytest.importorskip("torch")
    import transformers

    from selfreward_jax.model.config import from_hf

    made = {}

    def make(kind, dtype="float32", max_shard_size="1GB"):
        key = (kind, dtype, max_shard_size)
        if key not in made:
            name, fields = KINDS[kind]
            config = getattr(transformers, f"{name}Config")(**fields, attn_implementation="eager")
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
            with torch.no_grad():
                for path, parameter in model.named_parameters():
                    parameter.normal_(1.0 if "norm" in path else 0.0, 0.2)
            model = model.to(getattr(torch, dtype))
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            read = from_hf(json.loads((folder / "config.json").read_text()))
            made[key] = SimpleNamespace(folder=folder, config=read, model=model)
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_ids():
    """`[4,24]` int32 token ids below 96."""
    return np.random.default_rng(0).integers(0, 96, (4, 24)).astype(np.int32)


@pytest.fixture(scope="session")
def torch_logits():
    """`torch_logits(model, ids)`: float32 numpy logits of a transformers model."""
    torch = pytest.importorskip("torch")

    def compute(model, ids):
        with torch.no_grad():
            return model(torch.tensor(ids.astype(np.int64))).logits.float().numpy()

    return compute


@pytest.fixture(scope="session")
def our_logits():
    """`our_logits(config, params, ids, mesh)`: float32 numpy logits of our model; the mesh must be set."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from selfreward_jax.model import llama
    from selfreward_jax.sharding.rules import BATCH

    compute = llama.Compute(dtype="float32", remat="none")

    def run(config, params, ids, mesh):
        rows = P(BATCH, None) if ids.shape[0] % 4 == 0 else P(None, None)
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        placed = [jax.device_put(array, NamedSharding(mesh, rows)) for array in (ids.astype(np.int32), positions)]

        @jax.jit
        def forward(params, tokens, positions):
            hidden = llama.hidden_states(config, compute, params, tokens, positions)
            return llama.logits(config, llama.head_weights(config, compute, params), hidden)

        return np.asarray(forward(params, *placed))

    return run


@pytest.fixture
def upload_folder(bucket):
    """`upload_folder(folder, name)`: the files of a local folder as objects; gives their gs:// folder."""

    def put(folder, name="bucket/model"):
        for file in folder.iterdir():
            bucket.objects[f"{name}/{file.name}"] = file.read_bytes()
        return f"gs://{name}"

    return put
