"""Find the weight files of a directory: those that transformers or diffusers would read.

A directory may hold its weights several times: in one file and in shards with an index
({"weight_map": {tensor: file}}), as safetensors and as PyTorch files, and in variants (fp16, bf16,
non_ema). Of one variant, the libraries and this module read the first of these files that exists:

    transformers    model.safetensors, model.safetensors.index.json,
                    pytorch_model.bin, pytorch_model.bin.index.json
    diffusers       diffusion_pytorch_model.safetensors.index.json,
                    diffusion_pytorch_model.safetensors, diffusion_pytorch_model.bin

Sources: transformers' `_get_resolved_checkpoint_files` and diffusers' `ModelMixin.from_pretrained`,
which differ in whether an index precedes the single file. Files that neither library finds are read
if there are no others.
"""

import dataclasses
import pathlib
import re

from blip3o_jax.config import UserError
from blip3o_jax.convert.tensor_files import Tensor, check_not_pointer, read_file, read_json

# (stem, suffix, has an index), in each library's order of precedence.
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
# Names of a variant: NAME.fp16.safetensors and NAME.safetensors.index.fp16.json; older diffusers
# wrote NAME.safetensors.fp16.index.json, some repositories have NAME.fp16.safetensors.index.json.
# Of several indices of a variant the first form wins: it sorts last.
_NAME = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)})(\.(?P<a>\w+))??\.(?P<suffix>safetensors|bin)"
    r"(?P<index>(\.(?P<b>\w+))??\.index(\.(?P<c>\w+))??\.json)?"
)
_SHARD = re.compile(rf"({'|'.join(_STEMS)}).*-\d+-of-\d+.*\.(safetensors|bin)")


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """Hold the path of a directory's weight file, or of the index of several.

    `variant` is "" for the default one. `notes` has a line for each other weight file, which is not
    read.
    """

    file: pathlib.Path
    variant: str
    notes: tuple[str, ...]

    @property
    def is_index(self) -> bool:
        """Return whether the file is an index of shards."""
        return self.file.suffix == ".json"


def find_weights(
    directory: pathlib.Path, library: str = "transformers", variant: str = ""
) -> WeightFile | None:
    """Return the weight file that `library` would read in a directory, or None.

    It is of `variant` if the directory has it, else of the default or the only variant. Raises
    UserError for several variants without a default.
    """
    check_no_adapter(directory)
    if library == "transformers" and (named := _named_by_config(directory)) is not None:
        return WeightFile(
            named,
            "",
            (f"{named} is read, which config.json names under transformers_weights",),
        )
    found = _candidates(directory)
    if not found:
        return None
    order = [*ORDER[library], *_ANY]
    variants = sorted({name for name, _ in found})
    chosen = next((name for name in (variant, "") if name in variants), variants[0])
    if chosen not in (variant, "") and len(variants) > 1:
        raise UserError(
            f"{directory} has weights of the variants {', '.join(variants)} only: choose with "
            f"--variant={chosen}"
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
                f"{file} is read, as {library} does; {other.name} is not: delete the outdated file"
            )
        elif name and not chosen:
            notes.append(f"{file} is read; --variant={name} reads {other.name}")
    return WeightFile(file, chosen, tuple(notes))


def read_weights(
    path: pathlib.Path, library: str = "transformers", variant: str = ""
) -> tuple[dict[str, Tensor], WeightFile]:
    """Return ({name: tensor}, weight file) of a file, or of a directory by `find_weights`.

    Only headers are read. Raises UserError, naming file and tensor, for missing or damaged files
    and for shards that do not match their index.
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
    """Raise UserError for a directory of a PEFT adapter.

    PyTorch would read its weights from the base model that the adapter names.
    """
    file = directory / "adapter_config.json"
    if file.exists():
        raise UserError(
            f"{file} makes {directory} an adapter to another model: merge it first (peft: "
            f"merge_and_unload, save_pretrained), or delete {file.name} if the weights are merged"
        )


def _named_by_config(directory: pathlib.Path) -> pathlib.Path | None:
    """Return the file that config.json names, which takes precedence in transformers."""
    config = directory / "config.json"
    name = read_json(config).get("transformers_weights") if config.is_file() else None
    if name is None:
        return None
    plain = isinstance(name, str) and pathlib.PurePath(name).name == name
    if not plain or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(
            f"{config}: transformers_weights={name!r} must name a safetensors file or index in its "
            "directory"
        )
    check_not_pointer(directory / name)
    if not (directory / name).is_file():
        raise UserError(
            f"{directory / name} is missing, which {config} names under transformers_weights"
        )
    return directory / name


def _candidates(directory: pathlib.Path) -> dict[tuple[str, tuple[str, str, bool]], pathlib.Path]:
    """Return {(variant, (stem, suffix, has an index)): file} of all files named like weights."""
    found = {}
    for file in sorted(directory.iterdir()):
        match = _NAME.fullmatch(file.name)
        variants = [name for name in match.group("a", "b", "c") if name] if match else []
        if match and len(variants) <= 1 and file.is_file():
            kind = (match["stem"], match["suffix"], match["index"] is not None)
            found[variants[0] if variants else "", kind] = file
    return found


def _no_weights(directory: pathlib.Path) -> str:
    """Return the error message for a directory without weights."""
    names = sorted(file.name for file in directory.iterdir())
    for name in names:
        if _NAME.fullmatch(name):
            check_not_pointer(directory / name)  # a dangling link
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        return (
            f"{directory} holds {shards[0]} ({len(shards)} shards in all), but no index of them: "
            "copy the .index.json too"
        )
    wanted = (
        "model.safetensors, its index.json, diffusion_pytorch_model.*, .bin, or variants of these"
    )
    return f"{directory} holds no weights: looked for {wanted}"


def _unlisted_shards(index: pathlib.Path, tensors: dict[str, Tensor]) -> list[str]:
    """Return a note on shards that the index does not list, left by an earlier save."""
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
        # An index may come from anywhere: it must not name files outside of its directory.
        if pathlib.PurePath(name).name != name:
            raise UserError(
                f"{index} lists tensors in {name!r}: shards must be in the directory of their index"
            )
        named = [key for key, file in weight_map.items() if str(file) == name]
        check_not_pointer(shard)
        if not shard.is_file():
            raise UserError(
                f"{shard} is missing: {index.name} lists {len(named)} tensors of it, such as "
                f"{named[0]}"
            )
        found = read_file(shard)
        if missing := sorted(set(named) - set(found)):
            raise UserError(
                f"{shard} lacks {missing[0]} ({len(missing)} in all), which {index.name} lists: "
                "copy both again"
            )
        if extra := sorted(set(found) - set(named)):
            raise UserError(
                f"{shard} holds {extra[0]} ({len(extra)} in all), which {index.name} does not list "
                "there: copy both again"
            )
        tensors |= found
    return tensors
