"""Describe how a family of a part is converted: tensors, config.json and PyTorch class.

The rows of part_registry.py name these. Needs no torch: classes of PyTorch are named and imported
when one is made.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from blip3o_jax.config import ModelConfig, UserError
from blip3o_jax.convert import stock_config as layouts
from blip3o_jax.convert import tables
from blip3o_jax.convert.stock_config import ConfigLayout, check_object, refuse
from blip3o_jax.convert.tables import CONVERTED_PARTS, Rule
from blip3o_jax.convert.tensor_files import Tensor
from blip3o_jax.convert.weight_files import WeightFile
from blip3o_jax.part_registry import PART_TABLE, family_of, resolve, settings_of


class OpenedFile(NamedTuple):
    """Hold a part's own file: its path, the options stated in it, and its tensors by name."""

    path: pathlib.Path
    args: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: WeightFile


@dataclasses.dataclass(frozen=True)
class PartFile:
    """Describe the file of a part that is published in one of its own, not as a stock class.

    `name`: of the file without suffix, of its directory in an export and of the export's option.
    `option` and `sizes_option` are the options of an import that name the file, and a JSON file of
    sizes; `published` describes the sizes without the latter. `open` reads a file, or a directory
    of one, without the values of its tensors. `settings`: (settings, args, JSON file of sizes or
    None) -> settings. `torch_state` returns the state dict of a PyTorch file as PyTorch loads it.
    `finish`: (directory with NAME.safetensors, settings) -> notes; it writes what else belongs
    there. `constants` holds the tensors that the file has and this package does not use.
    """

    name: str
    option: str
    sizes_option: str
    published: str
    open: Callable[[pathlib.Path], OpenedFile]
    settings: Callable[[Any, Mapping[str, Any], pathlib.Path | None], Any]
    torch_state: Callable[[pathlib.Path], Mapping[str, Any]]
    finish: Callable[[pathlib.Path, Any], Sequence[str]]
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Hold one family's conversion to PyTorch and back.

    `rules` maps the part's settings to the table of its tensors. `torch_class` is "module:class" of
    the PyTorch network; classes of transformers and diffusers are created from `layout`, others
    from the arguments of the network here. `prefix` is that of the tensors in a BLIP3o-NEXT
    directory. `layers` names the PyTorch classes whose instances are stacked in this package.

    The PyTorch class is called by `velocity`, for a diffusion head: (module, latents [B, C, H, W],
    condition tokens, timesteps) -> velocity; and by `encode` and `decode`, for an autoencoder:
    (module, images [B, 3, H, W]) -> raw latents [B, C, h, w], and back. A language model is a
    causal one of transformers; a vision tokenizer's class has the methods of
    `image_tokens.protocol`.

    `published` holds the values of a BLIP3o-NEXT directory's config.json that differ from the stock
    class's, `config_keys` maps the settings to further keys of it. `buffers` maps the settings to
    the tensors that the stock class computes and stores, {name: value}. `unread` holds names, or
    prefixes of names, of tensors that this package does not use and stores unchanged;
    `check_unread`: (name, tensor) raises UserError for one that contradicts what is computed here.
    `constants` holds those that a BLIP3o-NEXT directory needs where none were imported.
    `spellings` are pairs (prefix in the table, another prefix that published files have for it).
    `file` is None unless the part is published in a file of its own.
    """

    rules: Callable[[Any], list[Rule]]
    torch_class: str
    _: dataclasses.KW_ONLY
    prefix: str = ""
    layers: tuple[str, ...] = ()
    layout: ConfigLayout | None = None
    velocity: Callable[[Any, Any, Any, Any], Any] | None = None
    encode: Callable[[Any, Any], Any] | None = None
    decode: Callable[[Any, Any], Any] | None = None
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config_keys: Callable[[Any], Mapping[str, Any]] = lambda settings: {}
    buffers: Callable[[Any], Mapping[str, np.ndarray]] = lambda settings: {}
    unread: tuple[str, ...] = ()
    check_unread: Callable[[str, Tensor], None] = lambda key, tensor: None
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    spellings: tuple[tuple[str, str], ...] = ()
    file: PartFile | None = None

    @property
    def library(self) -> str:
        """Return "transformers", "diffusers" or, for a class of this package, "blip3o_jax"."""
        return self.torch_class.partition(":")[0].partition(".")[0]


QWEN3 = Conversion(
    tables.qwen3,
    "transformers:Qwen3ForCausalLM",
    layers=("Qwen3DecoderLayer",),
    layout=layouts.QWEN3,
    published={"architectures": ["blip3oQwenForCausalLM"], "model_type": "blip3o_qwen"},
    unread=("model.und_image_vae_as_noise_connector.",),
)
QWEN2 = Conversion(
    tables.qwen2,
    "transformers:Qwen2ForCausalLM",
    layers=("Qwen2DecoderLayer",),
    layout=layouts.QWEN2,
)
SANA = Conversion(
    tables.sana,
    "diffusers:SanaTransformer2DModel",
    prefix="model.sana.",
    layers=("SanaTransformerBlock",),
    layout=layouts.SANA,
    velocity=lambda dit, z, condition, timestep: dit(z, condition, timestep=timestep).sample,
)
DC_AE = Conversion(
    tables.dc_ae,
    "diffusers:AutoencoderDC",
    prefix="model.sana_vae.",
    layers=("ResBlock", "EfficientViTBlock"),
    layout=layouts.DC_AE,
    encode=lambda vae, images: vae.encode(images).latent,
    decode=lambda vae, latents: vae.decode(latents).sample,
)
CONNECTOR = Conversion(
    tables.connector,
    "blip3o_jax.convert.torch_parts:Connector",
    prefix="model.diffusion_connector.",
)
LATENT_CONNECTOR = dataclasses.replace(CONNECTOR, prefix="model.und_image_vae_connector.")
FEATURE_CONNECTOR = dataclasses.replace(CONNECTOR, prefix="model.tar_siglip_features_connector.")


def conversion_of(part: str, cfg: ModelConfig) -> Conversion:
    """Return the conversion of a part of a model. Raises UserError for a family without one."""
    family = family_of(part, cfg)
    if not family.conversion:
        raise UserError(
            f"part {part!r} is of a family without a conversion ({family.settings.__name__}): name "
            "one in part_registry.py"
        )
    found: Conversion = resolve(family.conversion)
    return found


def conversions(part: str) -> list[Conversion]:
    """Return the conversions of all families of a part."""
    return [resolve(family.conversion) for family in PART_TABLE[part].families if family.conversion]


def prefix_of(part: str, cfg: ModelConfig) -> str:
    """Return the prefix of a part's tensors in a BLIP3o-NEXT directory."""
    return conversion_of(part, cfg).prefix


@functools.cache
def known_prefixes() -> dict[str, str]:
    """Return {prefix: part} of all families, the longest prefix first: the AR's is empty, and
    every name begins with it.
    """
    found = {c.prefix: part for part in CONVERTED_PARTS for c in conversions(part)}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def stacked_layers() -> set[str]:
    """Return the names of the PyTorch classes whose instances are stacked in this package."""
    return {name for part in CONVERTED_PARTS for c in conversions(part) for name in c.layers}


def rules(part: str, cfg: ModelConfig) -> list[Rule]:
    """Return the table of one part of a model."""
    return conversion_of(part, cfg).rules(settings_of(part, cfg))


def stock_config(name: str, cfg: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json (JSON values) that the stock class is built from.

    `name` is "ar", "dit", "vae" or "scheduler". The exporter adds dtype and ids of special tokens.
    """
    if name == "scheduler":
        return layouts.SCHEDULER.write(cfg.flow)
    found = conversion_of(name, cfg) if name in PART_TABLE else None
    if found is None or found.layout is None:
        raise ValueError(
            f"no stock class has a config.json for part {name!r}: use ar, dit, vae or scheduler"
        )
    values = found.layout.write(settings_of(name, cfg))
    if found.library == "transformers":
        values = {"architectures": [found.torch_class.partition(":")[2]]} | values
    return values


def conversion_of_config(part: str, values: Any, where: str) -> Conversion:
    """Return the conversion of the family whose class the config.json `where` names, or of the
    first one if it names none. Raises UserError for another class.
    """
    check_object(values, where)
    kinds: dict[str, tuple[Any, ...]] = {}
    for conversion in conversions(part):
        if (layout := conversion.layout) is None:
            continue
        kinds[layout.kind] = kinds.get(layout.kind, ()) + layout.fixed[layout.kind]
        if values.get(layout.kind, kinds[layout.kind][0]) in layout.fixed[layout.kind]:
            return conversion
    kind, known = next(iter(kinds.items()))
    refuse(where, kind, values[kind], known)


def read_stock_config(part: str, values: Any, where: str) -> Any:
    """Return the settings of a part from the values of the config.json `where`.

    Raises UserError for values that are not supported.
    """
    layout = conversion_of_config(part, values, where).layout
    assert layout is not None, "a family without a layout is not found by a config.json"
    return layout.read(values, where)
