"""Llama in Flax NNX: the only package that knows NNX; everybody else sees a nested dict of arrays."""
