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
    """Set one data set of a mixture."""

    path: Path = ""
    """File, directory, glob or brace pattern (`shards/{00000..00031}.tar`) of the data set."""
    format: DataFormat = "auto"
    """Format of the data set: `tfds` (ArrayRecord directory), `webdataset` (tar files), `parquet`,
    `folder` (images and captions.jsonl), or `auto`, which detects it from the path.
    """
    weight: Positive = 1.0
    """Share of the examples that come from this data set, relative to the other weights."""
    split: Path = "train"
    """Split to read, for format `tfds`."""
    task: Literal["", "reconstruct"] = ""
    """`reconstruct` takes each image as its own reference, to be reconstructed from its tokens,
    and leaves out the caption. `""` has a record's fields determine its task.
    """
    images: Path = ""
    """Directory that image paths are relative to, in addition to that of captions.jsonl, for format
    `folder`.
    """


@dataclasses.dataclass(frozen=True)
class DataConfig(ConfigGroup, path="data"):
    """Set the data sets, and how their records become batches of rows."""

    path: Path = ""
    """File, directory, glob or brace pattern of a single data set; a mixture is given as `sources`
    instead.
    """
    format: DataFormat = "auto"
    """Format of the data set at `path`, as in `data.sources`."""
    split: Path = "train"
    """Split of the data set at `path`, for format `tfds`."""
    images: Path = ""
    """Directory that image paths are relative to, for format `folder` at `path`."""
    sources: tuple[SourceConfig, ...] = ()
    """Data sets of a mixture. That of `path`, if one is given, joins them with weight 1."""
    batch_size: BatchSize = 512
    """Examples of a step, on all devices together; with `pack` above 1 slots, of which few stay
    empty.
    """
    max_length: Annotated[int, Bounds(0, 2**20)] = 1152
    """Tokens of a row, prompt and image together. 0 chooses a multiple of 128 by the examples'
    lengths, with which the run also resumes.
    """
    pack: Annotated[int, Bounds(1, 4096)] = 1
    """Examples that share a row at most, one after the other. Which ones do is planned by their
    lengths, so that rows are full.
    """
    crop: Literal["shared", "reference"] = "shared"
    """`shared` gives tokenizer and autoencoder the same centre crop. `reference` does as the
    published pipelines: the tokenizer sees the whole image, squashed to a square.
    """
    workers: Annotated[int, Bounds(0, 1024)] = 8
    """Decoding processes of each host; 0 decodes in threads of the training process."""
    prefetch: Annotated[int, Bounds(1, 1024)] = 2
    """Batches that each worker keeps ready."""
    shuffle: bool = True
    """Shuffle the records of each data set in every epoch."""
    max_bad_fraction: Fraction = 0.01
    """Fraction of the examples whose record cannot be read above which the run stops."""
    too_long: Literal["skip", "truncate", "error"] = "skip"
    """Treatment of a record whose text leaves no room for its image in the row: `skip` counts
    and skips it, `truncate` cuts the text and never the image's tokens, `error` ends the run.
    """
    max_pixels: Annotated[int, Bounds(1, 2**31)] = 80_000_000
    """Pixels of the largest image that is decoded. A record whose image's header announces more
    counts as one that cannot be read.
    """
    held_out: Annotated[float, Bounds(0, 0.5)] = 0.0
    """Fraction of the captions that training leaves out, with all their records; a hash of the
    caption selects them. Their losses are the metrics `eval/*`, every `eval_every` steps.
    """
    cache_dir: Path = ""
    """Directory that stores the outputs of the frozen encoders (image ids and latents), which are
    then computed once; `""` encodes in every step.
    """

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
