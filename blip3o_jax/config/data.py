"""Settings of the data: sources, batches, rows."""

import dataclasses
from typing import Annotated, Literal

from blip3o_jax.config.constraints import Bounds
from blip3o_jax.config.errors import check
from blip3o_jax.config.fields import ConfigGroup
from blip3o_jax.config.types import BatchSize, Fraction, Path, Positive

DataFormat = Literal["auto", "tfds", "webdataset", "parquet", "folder"]


@dataclasses.dataclass(frozen=True)
class SourceConfig(ConfigGroup, path="data.sources"):
    """Set one data set. `format`: tfds (ArrayRecord directory), webdataset (tar file, glob or
    directory), parquet, folder (images + captions.jsonl), or auto (detected from the path). `task`
    "reconstruct" uses the images of captioned records as references to reconstruct from their
    tokens; otherwise a record's fields determine its task.
    """

    path: Path = ""
    format: DataFormat = "auto"
    weight: Positive = 1.0
    split: Path = "train"
    task: Literal["", "reconstruct"] = ""
    # Format folder: a directory that image paths are relative to, in addition to the directory of
    # captions.jsonl.
    images: Path = ""


@dataclasses.dataclass(frozen=True)
class DataConfig(ConfigGroup, path="data"):
    """Set the data sets, and how their records become batches of rows."""

    # A single source can be given as `path` (and `format`, `split`, `images`); a mixture as
    # `sources`.
    path: Path = ""
    format: DataFormat = "auto"
    split: Path = "train"
    images: Path = ""
    sources: tuple[SourceConfig, ...] = ()
    batch_size: BatchSize = 512  # global, in examples
    # Tokens of one row, prompt and image together.
    max_length: Annotated[int, Bounds(1, 2**20)] = 1152
    # Examples that share a row, one after the other: short ones leave room for long ones.
    pack: Annotated[int, Bounds(1, 4096)] = 1
    # "shared": one centre crop for tokenizer and autoencoder; "reference": tokenizer
    # squashed.
    crop: Literal["shared", "reference"] = "shared"
    # Decoding processes per host; 0 decodes in threads of the training process.
    workers: Annotated[int, Bounds(0, 1024)] = 8
    prefetch: Annotated[int, Bounds(1, 1024)] = 2  # batches each worker keeps ready
    shuffle: bool = True
    max_bad_fraction: Fraction = 0.01  # of the records seen; above it the run stops
    # What becomes of a record whose text leaves no room for its image in the row: "skip" (counted),
    # "truncate" (the text is cut, never the image's tokens) or "error" (the run ends).
    too_long: Literal["skip", "truncate", "error"] = "skip"
    # Of an image, counted from its header; a record with a larger one cannot be read.
    max_pixels: Annotated[int, Bounds(1, 2**31)] = 80_000_000
    # Fraction of the captions that training leaves out, with all their records (by a hash of the
    # caption, data/held_out.py). Their losses are the metrics eval/*, every `eval_every` steps.
    held_out: Annotated[float, Bounds(0, 0.5)] = 0.0
    # Where ids and latents of the frozen encoders are kept; "" encodes inside the step.
    cache_dir: Path = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.batch_size % self.pack == 0,
            f"data.batch_size={self.batch_size} must be a multiple of data.pack={self.pack}",
        )

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Return the single source of `path` and those of `sources`."""
        single = (
            (SourceConfig(self.path, self.format, 1.0, self.split, images=self.images),)
            if self.path
            else ()
        )
        return single + self.sources
