"""Self-Rewarding Language Models in JAX: a Llama that makes, judges and learns from its own preference data."""

import os

__version__ = "0.1.0"

# transformers, which reads tokenizers here, else advises at every start to install PyTorch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
