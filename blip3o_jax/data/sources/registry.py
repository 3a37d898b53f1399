"""Open the data sets of a configuration: one source, or a mixture of several.

The format follows from the path unless the configuration names it.
"""

import os
import pathlib
from typing import Literal

from blip3o_jax import config
from blip3o_jax.config import UserError
from blip3o_jax.data.held_out import divide
from blip3o_jax.data.index_builder import ProcessGroup
from blip3o_jax.data.record import Record, Source, TextFields, make_record
from blip3o_jax.data.sources.folder import CAPTION_FILES, FolderSource
from blip3o_jax.data.sources.parquet import ParquetSource
from blip3o_jax.data.sources.shards import expand_pattern, list_shards
from blip3o_jax.data.sources.tfds import TfdsSource, tfds_directories
from blip3o_jax.data.sources.webdataset import WebdatasetSource


def open_mixture(
    data: config.DataConfig, processes: ProcessGroup = ProcessGroup()
) -> list[tuple[Source, float]]:
    """Return the sources that a run trains on, with their weights: without the records that
    `data.held_out` holds out. `processes` are those that open them together. Raises UserError for a
    source whose records are all held out.
    """
    if not data.all_sources:
        raise config.ConfigError(
            "data.path is empty: set --config.data.path to a data set, or data.sources to a mixture"
        )
    sources = [
        (open_source(source, processes, held_out=data.held_out), source.weight)
        for source in data.all_sources
    ]
    for source, _ in sources:
        if not len(source):
            raise UserError(
                f"data.held_out={data.held_out:g} holds out all records of {source.name}: its"
                " captions are too alike; lower data.held_out, or set it to 0"
            )
    return sources


def open_held_out(
    data: config.DataConfig, processes: ProcessGroup = ProcessGroup()
) -> list[tuple[Source, float]]:
    """Return the held-out records of each source of a run, with the weights of `open_mixture`; an
    empty list with data.held_out=0. Raises UserError where no record is held out.
    """
    if not data.held_out:
        return []
    sources = [
        (
            open_source(source, processes, held_out=data.held_out, subset="held_out"),
            source.weight,
        )
        for source in data.all_sources
    ]
    found = [(source, weight) for source, weight in sources if len(source)]
    if not found:
        raise UserError(
            f"data.held_out={data.held_out:g} holds out no record of {sources[0][0].name}: it has"
            " too few captions; raise data.held_out, or set it to 0"
        )
    return found


def open_source(
    cfg: config.SourceConfig,
    processes: ProcessGroup = ProcessGroup(),
    *,
    rebuild: str = "",
    held_out: float = 0.0,
    subset: Literal["train", "held_out"] = "train",
) -> Source:
    """Open `cfg.path`: a file, a directory, a glob, or a brace pattern such as
    `shards/{00000..00031}.tar`. A missing index is built; `rebuild` as in `open_index`. With
    `held_out`, the fraction of captions held out (data/held_out.py), `subset` selects the records
    to train on or those held out; 0 holds out none.

    Raises:
      UserError: nothing there, an unknown format, an empty or damaged data set; one line that names
        it.
    """
    path = os.path.expanduser(cfg.path)
    files = expand_pattern(path)
    kind = _detect(path, files) if cfg.format == "auto" else cfg.format
    if kind == "tfds":
        source: Source = TfdsSource(path, cfg.split, processes, rebuild)
    elif kind == "folder":
        source = FolderSource(path, cfg.images, processes, rebuild)
    elif kind == "webdataset":
        source = WebdatasetSource(path, list_shards(path, files, ".tar"), processes, rebuild)
    else:
        source = ParquetSource(path, list_shards(path, files, ".parquet"), processes, rebuild)
    if not len(source):
        raise UserError(
            f"{path}: the data set is empty; give one with at least one captioned image"
        )
    if held_out:
        train, held = divide(source, held_out)
        source = train if subset == "train" else held
    return ReconstructionSource(source) if cfg.task == "reconstruct" else source


class ReconstructionSource(Source):
    """Read the images of `source` as reconstruction examples: each is its own target, without its
    caption.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source.name, source.files)
        self._source = source
        self.unused = source.unused
        self.incomplete = source.incomplete
        self.notes = source.notes

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        image = record.first_image
        return make_record(
            TextFields("reconstruct", "", ""), image, (image,), record.key, record.shard
        )

    @property
    def fingerprint(self) -> str:
        return f"{self._source.fingerprint}-reconstruct"


def _detect(path: str, files: list[str]) -> str:
    first = pathlib.Path(files[0])
    if first.is_dir():
        if any((first / name).exists() for name in CAPTION_FILES):
            return "folder"
        if tfds_directories(first):
            return "tfds"
        for suffix, kind in ((".tar", "webdataset"), (".parquet", "parquet")):
            if any(first.glob(f"*{suffix}")):
                return kind
        raise UserError(
            f"{path}: unknown format; expected dataset_info.json, {', '.join(CAPTION_FILES)}, *.tar"
            " or *.parquet in it"
        )
    kinds = {".tar": "webdataset", ".parquet": "parquet", ".jsonl": "folder"}
    if first.suffix not in kinds:
        raise UserError(
            f"{first}: unknown format; expected .tar (not compressed), .parquet, .jsonl or a"
            " directory"
        )
    return kinds[first.suffix]
