"""Self-Rewarding Language Models in JAX: a Llama that makes, judges and learns from its own preference data."""

__version__ = "0.1.0"
