"""Hugging Face safetensors and gguf files to and from sharded parameters; the name mapping is data."""
