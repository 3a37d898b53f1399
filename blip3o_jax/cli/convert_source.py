"""Add the flags that the conversions share: PyTorch's files and the dtype."""

import argparse
import sys

from blip3o_jax.cli import arguments
from blip3o_jax.config.errors import escaped

DTYPES = ("float32", "bfloat16", "float16")


def add_source(parser: argparse.ArgumentParser, flag: str) -> None:
    parser.add_argument(
        flag,
        type=arguments.path,
        required=True,
        metavar="HF_DIR",
        help="a BLIP3o-NEXT directory, or a stock Qwen3 or Qwen2 one (Tar)",
    )
    parser.add_argument(
        "--diffusion",
        type=arguments.path,
        metavar="DIR",
        help="a diffusers directory (SANA, SD3): transformer/, vae/, scheduler/",
    )
    parser.add_argument(
        "--ta_tok",
        type=arguments.path,
        metavar="FILE",
        help="the vision tokenizer's own file (ta_tok.pth)",
    )
    parser.add_argument(
        "--ta_tok_config",
        type=arguments.path,
        metavar="FILE.json",
        help=(
            "sizes of another vision tokenizer than the published: encoder, decoder,"
            " bottleneck_dim, codebook_size, select_layer, l2_normalized"
        ),
    )
    parser.add_argument(
        "--variant",
        type=arguments.text,
        default="",
        metavar="NAME",
        help=("variant of the weights: bf16 for model.bf16.safetensors (files without one)"),
    )
    parser.add_argument(
        "--initialise",
        type=arguments.names,
        default=(),
        metavar="NAMES",
        help=(
            "missing parts to initialise: connector, image_embeddings, latent_connector,"
            " feature_connector"
        ),
    )


def print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(f"note: {escaped(note)}", file=sys.stderr)


def format_bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
