"""Sample images and write them, for `sample`, `edit` and `reconstruct`."""

import argparse
from pathlib import Path

from blip3o_jax.cli import flags


def sample_to_directory(
    args: argparse.Namespace, requests: list[tuple[str, str, tuple[Path, ...]]]
) -> None:
    """Sample one image a request, each (task, text, images), into args.out."""
    from blip3o_jax.data import images

    given = [
        (task, text, tuple(map(images.load, paths)), args.size) for task, text, paths in requests
    ]
    # Flags that are not given keep the values of the checkpoint's config.
    overrides = {
        name: value for name in flags.SAMPLING if (value := getattr(args, name, None)) is not None
    }
    # After the images, so that one that cannot be read is reported before JAX is imported.
    from blip3o_jax import pipeline

    pipeline.generate_to_directory(
        args.checkpoint, given, args.out, seed=args.seed, overrides=overrides
    )
