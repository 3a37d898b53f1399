"""Read the configurations and headers of a source's files, without validating them."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from blip3o_jax import config as config_lib
from blip3o_jax.config import UserError
from blip3o_jax.convert.tables import PREFIXES
from blip3o_jax.convert.tensor_files import Tensor, load_torch, read_json, torch_tensors
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
    tensors: dict[str, Tensor]
    # (path, contents) of each configuration, None if absent
    transformer: tuple[pathlib.Path, dict[str, Any]] | None
    vae: tuple[pathlib.Path, dict[str, Any]] | None
    scheduler: tuple[pathlib.Path, dict[str, Any]] | None
    ta_tok: dict[str, Any]  # args of the TA-Tok file
    notes: list[str]
    variant: str = ""
    weight_sources: list[WeightSource] = dataclasses.field(default_factory=list)
    own_tokenizer: bool = False  # TA-Tok is in a separate file
    ta_tok_config: pathlib.Path | None = None

    @classmethod
    def read(
        cls,
        source: pathlib.Path,
        diffusion: pathlib.Path | None,
        ta_tok: pathlib.Path | None,
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
        files = cls(file, values, section, {}, None, None, None, {}, [], variant)
        if diffusion is not None:
            files._read_diffusion(diffusion)
        if ta_tok is not None:
            files.own_tokenizer = True
            files._read_ta_tok(ta_tok)
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
        for name, prefix in (
            ("transformer", PREFIXES["dit"]),
            ("vae", PREFIXES["vae"]),
            ("scheduler", ""),
        ):
            folder = directory / name
            if name == "transformer" and not folder.is_dir():
                folder = directory / "dit"
            file = folder / ("scheduler_config.json" if name == "scheduler" else "config.json")
            if not folder.is_dir():
                continue
            found = True
            setattr(self, name, (file, read_json(file)))
            if prefix and find_weights(folder, "diffusers", self.variant) is not None:
                self._add(
                    prefix, folder, "diffusers", *read_weights(folder, "diffusers", self.variant)
                )
            elif prefix:
                self.weight_sources.append(WeightSource(folder, None, prefix, "diffusers", {}))
                self.notes.append(f"{folder} holds no weights: only its sizes are read")
        if not found:
            raise UserError(
                f"{directory} holds none of transformer/, vae/, scheduler/: --diffusion takes a "
                "diffusers directory"
            )

    def _read_ta_tok(self, path: pathlib.Path) -> None:
        """Read a TA-Tok file, or the directory of one.

        The file is {"model": {"args": ..., "sd": ...}}, or safetensors with an args.json.
        """
        file = path
        prefix = PREFIXES["tokenizer"]
        if path.is_dir():
            file = next(
                (
                    path / f"ta_tok{s}"
                    for s in (".pth", ".safetensors")
                    if (path / f"ta_tok{s}").is_file()
                ),
                path,
            )
        if file.is_dir() or file.suffix == ".safetensors":
            args = file.with_name("args.json")
            self.ta_tok = read_json(args) if args.is_file() else {}
            self._add(prefix, file, "", *read_weights(file))
            return
        model = read_ta_tok_file(file)
        self.ta_tok = dict(model["args"])
        self._add(prefix, file, "", torch_tensors(model["sd"], file), WeightFile(file, "", ()))

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
            tensors, () if prefix else tuple(filter(None, PREFIXES.values())), str(weights.file)
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


def read_ta_tok_file(file: pathlib.Path) -> dict[str, Any]:
    """Return {"args": group, "sd": {name: torch tensor}} of a TA-Tok file of PyTorch.

    Raises UserError for any other file.
    """
    contents = load_torch(file)
    model = contents.get("model", contents) if isinstance(contents, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(model.get("sd"), Mapping):
        raise UserError(f"{file} is not a TA-Tok file: it has no model.sd; see docs/conversion.md")
    args = model.get("args") or {}
    if not isinstance(args, Mapping) or not all(isinstance(key, str) for key in model["sd"]):
        raise UserError(
            f"{file} is not a TA-Tok file: model.args and model.sd must be groups with names"
        )
    return {"args": args, "sd": model["sd"]}
