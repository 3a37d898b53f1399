"""Read the configurations and headers of a source's files, without comparing them."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from blip3o_jax import config as config_lib
from blip3o_jax.config import ModelConfig, UserError
from blip3o_jax.convert.conversions import conversion_of, conversion_of_config, known_prefixes
from blip3o_jax.convert.tensor_files import Tensor, read_json
from blip3o_jax.convert.weight_files import WeightFile, find_weights, read_weights
from blip3o_jax.convert.wrappers import unwrapped_names

SECTION = "blip3o_jax"  # the group in config.json of settings without a published key


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """Hold one source of tensors.

    `path` is the given directory or file; `weights` is the file read (None: config.json alone);
    `prefix` is the layout's prefix of its names; `library` is the library of its layout, or "";
    `unwrapped` is {name in the file: name without wrappers}.
    """

    path: pathlib.Path
    weights: WeightFile | None
    prefix: str
    library: str
    unwrapped: dict[str, str]

    @property
    def is_wrapped(self) -> bool:
        """Return whether any name has a wrapper's prefix."""
        return any(name != short for name, short in self.unwrapped.items())


@dataclasses.dataclass
class Files:
    """Hold the files of a source, unchecked; `tensors` maps full names to tensors."""

    config_file: pathlib.Path
    values: dict[str, Any]  # config.json of the source
    section: dict[str, Any]
    model: ModelConfig  # of the section; without one the published model
    tensors: dict[str, Tensor]
    # (path, contents) of each configuration, None if absent
    transformer: tuple[pathlib.Path, dict[str, Any]] | None
    vae: tuple[pathlib.Path, dict[str, Any]] | None
    scheduler: tuple[pathlib.Path, dict[str, Any]] | None
    tokenizer_args: dict[str, Any]  # stated in the vision tokenizer's own file
    notes: list[str]
    variant: str = ""
    weight_sources: list[WeightSource] = dataclasses.field(default_factory=list)
    own_tokenizer: bool = False  # the vision tokenizer is in a file of its own
    tokenizer_sizes: pathlib.Path | None = None

    @classmethod
    def read(
        cls,
        source: pathlib.Path,
        diffusion: pathlib.Path | None,
        tokenizer: pathlib.Path | None,
        variant: str = "",
    ) -> "Files":
        """Read configurations and headers; UserError for missing or damaged files."""
        file = source / "config.json"
        if not file.is_file():
            raise UserError(
                f"{source} holds no config.json: give a BLIP3o-NEXT, Qwen3 or Qwen2 directory"
            )
        values = read_json(file)
        section = values.get(SECTION, {})
        config_lib.check(isinstance(section, dict), f"{file}: {SECTION} must be a group of fields")
        model = config_lib.from_dict(
            section.get("model", {}), ModelConfig, f"{file}: {SECTION}.model"
        )
        files = cls(file, values, section, model, {}, None, None, None, {}, [], variant)
        if diffusion is not None:
            files._read_diffusion(diffusion)
        if tokenizer is not None:
            files._read_tokenizer(tokenizer)
        files._add("", source, "transformers", *read_weights(source, "transformers", variant))
        files._check_variant(source)
        return files

    def _check_variant(self, source: pathlib.Path) -> None:
        found = [
            weight_source.weights.variant
            for weight_source in self.weight_sources
            if weight_source.weights is not None
        ]
        if self.variant and self.variant not in found:
            raise UserError(
                f"--variant={self.variant}: neither {source} nor the other sources have weights of "
                "that variant"
            )

    def _read_diffusion(self, directory: pathlib.Path) -> None:
        """Read those of transformer/ (or dit/, as exports name it), vae/, scheduler/ that exist."""
        found = False
        for name, part in (("transformer", "dit"), ("vae", "vae"), ("scheduler", "")):
            folder = directory / name
            if name == "transformer" and not folder.is_dir():
                folder = directory / "dit"
            file = folder / ("scheduler_config.json" if name == "scheduler" else "config.json")
            if not folder.is_dir():
                continue
            found = True
            values = read_json(file)
            setattr(self, name, (file, values))
            if not part:
                continue
            prefix = conversion_of_config(part, values, str(file)).prefix
            if find_weights(folder, "diffusers", self.variant) is not None:
                self._add(
                    prefix, folder, "diffusers", *read_weights(folder, "diffusers", self.variant)
                )
            else:
                self.weight_sources.append(WeightSource(folder, None, prefix, "diffusers", {}))
                self.notes.append(f"{folder} holds no weights: only its sizes are read")
        if not found:
            raise UserError(
                f"{directory} holds none of transformer/, vae/, scheduler/: --diffusion takes a "
                "diffusers directory"
            )

    def _read_tokenizer(self, path: pathlib.Path) -> None:
        """Read the vision tokenizer's own file."""
        conversion = conversion_of("tokenizer", self.model)
        if conversion.file is None:
            kind = type(self.model.tokenizer).model_type
            raise UserError(f"{path}: a vision tokenizer {kind!r} has no file of its own")
        opened = conversion.file.open(path)
        self.own_tokenizer = True
        self.tokenizer_args = opened.args
        self._add(conversion.prefix, opened.path, "", opened.tensors, opened.weights)

    def _add(
        self,
        prefix: str,
        path: pathlib.Path,
        library: str,
        tensors: Mapping[str, Tensor],
        weights: WeightFile,
    ) -> None:
        """Add tensors, replacing earlier ones of the same name.

        Replaced tensors and names with wrappers are noted.
        """
        unwrapped = unwrapped_names(
            tensors, () if prefix else tuple(filter(None, known_prefixes())), str(weights.file)
        )
        weight_source = WeightSource(path, weights, prefix, library, unwrapped)
        self.weight_sources.append(weight_source)
        self.notes += weights.notes
        if weight_source.is_wrapped:
            name = next(name for name, short in unwrapped.items() if name != short)
            self.notes.append(
                f"{weights.file}: {name} is read as {unwrapped[name]}, without the wrapper's prefix"
            )
        named = {
            prefix + unwrapped[key]: dataclasses.replace(tensor, key=prefix + unwrapped[key])
            for key, tensor in tensors.items()
        }
        if both := set(named) & set(self.tensors):
            first = min(both)
            self.notes.append(
                f"{len(both)} tensors, such as {first}, are in {self.tensors[first].file.name} and "
                f"in {named[first].file}: the latter are used"
            )
        self.tensors |= named

    def unknown_prefix(self, name: str) -> str:
        """Return advice if the files have `name` after an unknown prefix, else "".

        `name` is of a tensor, or the prefix of a part.
        """
        found = next((key for key in self.tensors if f".{name}" in key), "") if name else ""
        prefix = found.partition(f".{name}")[0]
        return (
            f"the files name it {found}: save the weights without the prefix {prefix}."
            if found
            else ""
        )

    def unread_files(self) -> str:
        """Return notes on weight files that are not read, as "; ...", or "".

        They may explain missing tensors.
        """
        notes = [
            note
            for weight_source in self.weight_sources
            if weight_source.weights is not None
            for note in weight_source.weights.notes
        ]
        return "".join(f"; {note}" for note in notes)
