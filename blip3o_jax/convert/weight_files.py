"""Find the files of a directory that are its weights: those that transformers or diffusers would
read, and no others.

A directory may hold its weights more than once: in one file and in shards with an index
({"weight_map": {tensor: file}}), as safetensors and as PyTorch's own files, and in variants (fp16,
bf16, non_ema). Of one variant the libraries read

    transformers    model.safetensors, model.safetensors.index.json,
                    pytorch_model.bin, pytorch_model.bin.index.json
    diffusers       diffusion_pytorch_model.safetensors.index.json,
                    diffusion_pytorch_model.safetensors, diffusion_pytorch_model.bin

the first of these that is there (transformers' `_get_resolved_checkpoint_files` and diffusers'
`ModelMixin.from_pretrained`, which disagree on whether an index comes before the single file). So
does this module. Files that neither library would find are taken where there is nothing else.
"""

import dataclasses
import pathlib
import re

from blip3o_jax.config import UserError
from blip3o_jax.convert.tensor_files import Tensor, check_not_pointer, read_file, read_json

# (stem, suffix, has an index), in the order in which each library looks.
ORDER = {
    "transformers": (
        ("model", "safetensors", False),
        ("model", "safetensors", True),
        ("pytorch_model", "bin", False),
        ("pytorch_model", "bin", True),
    ),
    "diffusers": (
        ("diffusion_pytorch_model", "safetensors", True),
        ("diffusion_pytorch_model", "safetensors", False),
        ("diffusion_pytorch_model", "bin", False),
    ),
}
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_ANY = tuple(
    (stem, suffix, index)
    for stem in _STEMS
    for suffix in ("safetensors", "bin")
    for index in (True, False)
)
# NAME.fp16.safetensors; NAME.safetensors.index.fp16.json, before that
# NAME.safetensors.fp16.index.json in diffusers, and NAME.fp16.safetensors.index.json in some
# repositories. Of several for one variant the first form is taken: it sorts last.
_NAME = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)})(\.(?P<a>\w+))??\.(?P<suffix>safetensors|bin)"
    r"(?P<index>(\.(?P<b>\w+))??\.index(\.(?P<c>\w+))??\.json)?"
)
_SHARD = re.compile(rf"({'|'.join(_STEMS)}).*-\d+-of-\d+.*\.(safetensors|bin)")


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """The file of a directory's weights, or the index of several; `variant` "" for the default one.
    `notes`: a line for each other file that holds weights and is not read."""

    file: pathlib.Path
    variant: str
    notes: tuple[str, ...]

    @property
    def is_index(self) -> bool:
        return self.file.suffix == ".json"


def find_weights(
    directory: pathlib.Path, library: str = "transformers", variant: str = ""
) -> WeightFile | None:
    """Return the weights that `library` would read of a directory, or None where there are none.

    `variant`: the one to take where the directory has it; else the default one, or the only one
    there is. UserError where there are several variants to choose from and no default.
    """
    check_no_adapter(directory)
    if library == "transformers" and (named := _named_by_config(directory)) is not None:
        return WeightFile(
            named,
            "",
            (f"{named} is read, which config.json beside it names under transformers_weights",),
        )
    found = _candidates(directory)
    if not found:
        return None
    order = [*ORDER[library], *_ANY]
    variants = sorted({name for name, _ in found})
    chosen = next((name for name in (variant, "") if name in variants), variants[0])
    if chosen not in (variant, "") and len(variants) > 1:
        raise UserError(
            f"{directory} has its weights in the variants {', '.join(variants)} only: choose by --variant={chosen}"
        )
    kind = next(kind for kind in order if (chosen, kind) in found)
    file = found[chosen, kind]
    notes = []
    if chosen != variant:
        missing = f"there is no {variant or 'default'} variant"
        notes.append(
            f"{file} is read: {missing} in {directory}"
            + (f", {chosen} is the only one" if chosen else "")
        )
    for (name, _), other in found.items():
        if name == chosen and other != file:
            notes.append(
                f"{file} is read, as {library} does; {other.name} beside it is not: delete what is out of date"
            )
        elif name and not chosen:
            notes.append(f"{file} is read; --variant={name} reads {other.name}")
    return WeightFile(file, chosen, tuple(notes))


def read_weights(
    path: pathlib.Path, library: str = "transformers", variant: str = ""
) -> tuple[dict[str, Tensor], WeightFile]:
    """Return ({name: tensor}, where they lie) of a file, or of a directory by `find_weights`.
    Headers alone are read.

    UserError, naming file and tensor, for what is missing, cut off or not as its index says.
    """
    if path.is_file():
        return read_file(path), WeightFile(path, "", ())
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a directory with config.json and weights")
    if (found := find_weights(path, library, variant)) is not None and found.is_index:
        tensors = _read_index(found.file)
        return tensors, dataclasses.replace(
            found, notes=(*found.notes, *_unlisted_shards(found.file, tensors))
        )
    if found is not None:
        return read_file(found.file), found
    raise UserError(_no_weights(path))


def check_no_adapter(directory: pathlib.Path) -> None:
    """Refuse a directory whose weights PyTorch would read elsewhere: from the base model that an
    adapter of PEFT names."""
    file = directory / "adapter_config.json"
    if file.exists():
        raise UserError(
            f"{file} makes {directory} an adapter to another model: merge it first (peft: "
            f"merge_and_unload, save_pretrained), or delete {file.name} if the weights beside it are merged"
        )


def _named_by_config(directory: pathlib.Path) -> pathlib.Path | None:
    """Return the file that config.json names, which transformers reads before all others."""
    config = directory / "config.json"
    name = read_json(config).get("transformers_weights") if config.is_file() else None
    if name is None:
        return None
    plain = isinstance(name, str) and pathlib.PurePath(name).name == name
    if not plain or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(
            f"{config}: transformers_weights={name!r} must name a safetensors file or index beside it"
        )
    check_not_pointer(directory / name)
    if not (directory / name).is_file():
        raise UserError(
            f"{directory / name} is missing, which {config} names under transformers_weights"
        )
    return directory / name


def _candidates(directory: pathlib.Path) -> dict[tuple[str, tuple[str, str, bool]], pathlib.Path]:
    """Return {(variant, (stem, suffix, has an index)): file} of all files that are named like
    weights."""
    found = {}
    for file in sorted(directory.iterdir()):
        match = _NAME.fullmatch(file.name)
        variants = [name for name in match.group("a", "b", "c") if name] if match else []
        if match and len(variants) <= 1 and file.is_file():
            kind = (match["stem"], match["suffix"], match["index"] is not None)
            found[variants[0] if variants else "", kind] = file
    return found


def _no_weights(directory: pathlib.Path) -> str:
    """Return what a directory holds in place of weights."""
    names = sorted(file.name for file in directory.iterdir())
    for name in names:
        if _NAME.fullmatch(name):
            check_not_pointer(directory / name)  # a link to nothing
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        return f"{directory} holds {shards[0]} ({len(shards)} shards in all), but no index of them: copy the .index.json too"
    wanted = (
        "model.safetensors, its index.json, diffusion_pytorch_model.*, .bin, or variants of these"
    )
    return f"{directory} holds no weights: looked for {wanted}"


def _unlisted_shards(index: pathlib.Path, tensors: dict[str, Tensor]) -> list[str]:
    """Return a note of shards named like those of an index that does not list them: an earlier save
    left them.
    """
    read = {tensor.file.name for tensor in tensors.values()}
    stem, suffix = index.name.split(".")[:2]
    own = re.compile(rf"{stem}-\d+-of-\d+\.{suffix}")
    others = [
        file.name
        for file in sorted(index.parent.iterdir())
        if own.fullmatch(file.name) and file.name not in read
    ]
    return (
        [f"{index} lists nothing in {others[0]} ({len(others)} in all), which is not read"]
        if others
        else []
    )


def _read_index(index: pathlib.Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: copy it again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        shard = index.parent / name
        if pathlib.PurePath(name).name != name:
            raise UserError(
                f"{index} lists tensors in {name!r}: shards lie beside their index, by name alone"
            )
        named = [key for key, file in weight_map.items() if str(file) == name]
        check_not_pointer(shard)
        if not shard.is_file():
            raise UserError(
                f"{shard} is missing: {index.name} lists {len(named)} tensors of it, such as {named[0]}"
            )
        found = read_file(shard)
        if missing := sorted(set(named) - set(found)):
            raise UserError(
                f"{shard} lacks {missing[0]} ({len(missing)} in all), which {index.name} lists in it"
            )
        if extra := sorted(set(found) - set(named)):
            raise UserError(
                f"{shard} holds {extra[0]} ({len(extra)} in all), which {index.name} does not place there"
            )
        tensors |= found
    return tensors
