"""Packaging. The core install is lean and has no torch; heavy or rare dependencies are extras."""

import pathlib

from setuptools import find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in pathlib.Path("selfreward_jax/__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

setup(
    name="selfreward-jax",
    version=VERSION,
    description="Self-Rewarding Language Models in JAX: a Llama that makes, judges and learns from its own preference data",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["selfreward_jax", "selfreward_jax.*"]),
    package_data={"selfreward_jax": ["data/seed/*.jsonl", "judging/templates/*.txt"]},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "transformers>=5.0,<6",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "protobuf",
        "datasets>=4.0",
        "rouge-score>=0.1.2",
        "ml-collections>=1.1",
        "absl-py",
        "etils[epath]",
        "gguf>=0.17",
        "safetensors>=0.6",
        "huggingface_hub",
        "numpy",
        "pyarrow",
        "rich>=13",
        "scipy",
        "jinja2",
    ],
    extras_require={
        # torch is the independent reference of the numeric tests (through transformers); pinned, for a CPU build.
        "test": ["pytest>=8", "pytest-cov", "pytest-xdist", "hypothesis", "ruff", "pyright[nodejs]", "torch==2.13.0"],
        "gpu": ["jax[cuda13]>=0.10,<0.12"],
        "gcs": ["gcsfs"],  # gs:// folders; s3:// needs s3fs
        "k8s": ["kubernetes"],  # with it the processes of a Kubernetes job find each other
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "eval": ["lm-eval", "alpaca-eval"],
        # Rivals only: benchmarks/ and tests/golden/make_dpo_golden.py.
        "bench": ["torch==2.13.0", "trl", "llama-cpp-python"],
    },
    classifiers=["Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12"],
)
