"""Write the shapes data set to disk: a TFDS builder of ArrayRecord files that needs neither
TensorFlow nor a download.

    DATASET = OUT/shapes/<image_size>px_<train>_<validation>_<test>_seed<seed>/<version>
    DATASET/shapes-train.array_record-00000-of-00001, ...
    DATASET/prompts_train.jsonl       one prompt per line: {"key", "caption", **metadata}
    DATASET/prompts_test.jsonl        the held-out prompts

Features: image (PNG), caption, key, category, metadata (JSON, see `captions`).
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import cv2
import tensorflow_datasets as tfds
from absl import logging

from blip3o_jax import files
from blip3o_jax.config import check
from blip3o_jax.data.shapes.captions import describe, prompts
from blip3o_jax.data.shapes.draw import render
from blip3o_jax.data.shapes.scene import sample

PROMPTS = "prompts_{split}.jsonl"


@dataclasses.dataclass(kw_only=True)
class ShapesConfig(tfds.core.BuilderConfig):
    """Hold the arguments of `prepare`. The name contains all of them, so that a directory made with
    other arguments is never reused."""

    num_train: int = 20_000
    num_validation: int = 500
    num_test: int = 2_000
    image_size: int = 64
    seed: int = 0


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Build scenes of coloured shapes and short words, with captions. The test split holds
    combinations that the other splits do not contain."""

    # The data depend on the code in addition to the arguments: raise the version with every change
    # to scenes, rendering or captions.
    VERSION = tfds.core.Version("1.5.0")
    # Nothing is downloaded; TFDS would look for checksums in this directory, with a package that it
    # does not require itself.
    url_infos: ClassVar[dict[str, Any]] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.image_size
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                "caption": tfds.features.Text(),
                "key": tfds.features.Text(),
                "category": tfds.features.Text(),
                "metadata": tfds.features.Text(),
            }
        )
        return self.dataset_info_from_configs(features=features, description=Shapes.__doc__)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        sizes = {
            "train": config.num_train,
            "validation": config.num_validation,
            "test": config.num_test,
        }
        return {split: self._generate_examples(split, size) for split, size in sizes.items()}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for index in range(size):
            scene = sample(self.builder_config.seed, index, split)
            caption, metadata = describe(scene)
            yield (
                scene.key,
                {
                    "image": encode_png(render(scene, self.builder_config.image_size)),
                    "caption": caption,
                    "key": scene.key,
                    "category": scene.category,
                    "metadata": json.dumps(metadata),
                },
            )


def encode_png(image_HWC: Any) -> bytes:
    """Encode a uint8 RGB image [H, W, 3] as PNG."""
    return cv2.imencode(".png", image_HWC[..., ::-1])[1].tobytes()


def prepare(
    out: str | os.PathLike[str],
    *,
    num_train: int = 20_000,
    num_validation: int = 500,
    num_test: int = 2_000,
    image_size: int = 64,
    seed: int = 0,
) -> pathlib.Path:
    """Draw and write the data set under `out` unless these very arguments are there already;
    returns its directory, which `tfds.builder_from_directory` reads. An interrupted run leaves
    nothing that would be taken for a data set.
    """
    for name, value in (
        ("num_train", num_train),
        ("num_validation", num_validation),
        ("num_test", num_test),
    ):
        check(value > 0, f"{name}={value} must be positive")
    check(
        image_size >= 32,
        f"image_size={image_size} must be 32 or more: smaller scenes cannot be distinguished",
    )
    name = f"{image_size}px_{num_train}_{num_validation}_{num_test}_seed{seed}"
    config = ShapesConfig(
        name=name,
        num_train=num_train,
        num_validation=num_validation,
        num_test=num_test,
        image_size=image_size,
        seed=seed,
    )
    with _quiet():
        builder = Shapes(data_dir=os.fspath(out), config=config, file_format="array_record")
    directory = pathlib.Path(builder.data_path)
    total = num_train + num_validation + num_test
    if (directory / PROMPTS.format(split="test")).is_file():
        log(f"{total} scenes are in {directory} already")
        _write_prompts(
            directory, "train", num_train, seed
        )  # which earlier versions of this module did not write
        return directory
    log(f"drawing {total} scenes of {image_size} x {image_size} pixels")
    start = time.perf_counter()
    # TFDS requires a directory for downloads, though there are none.
    with _quiet(), tempfile.TemporaryDirectory() as downloads:
        settings = tfds.download.DownloadConfig(compute_stats="skip")
        builder.download_and_prepare(download_dir=downloads, download_config=settings)
    _write_prompts(directory, "train", num_train, seed)
    _write_prompts(
        directory, "test", num_test, seed
    )  # last: where this file is, the data set is complete
    seconds = time.perf_counter() - start
    log(f"wrote {directory} in {seconds:.1f} s ({total / seconds:.0f} scenes/s)")
    return directory


def log(line: str) -> None:
    """Print a line to stderr."""
    print(f"shapes: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence TFDS's messages about downloads and custom configurations."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _write_prompts(directory: pathlib.Path, split: str, count: int, seed: int) -> None:
    """Write the prompts file atomically, unless it exists."""
    path = directory / PROMPTS.format(split=split)
    if not path.is_file():
        lines = [json.dumps(prompt) + "\n" for prompt in prompts(split, count, seed)]
        files.replace_text(path, "".join(lines))
