"""Describe how a family of a part is converted: tensors, config.json and PyTorch class.

The rows of part_registry.py name these. Needs no torch: classes of PyTorch are named and imported
when one is made.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from blip3o_jax.config import ModelConfig
from blip3o_jax.convert import stock_config as layouts
from blip3o_jax.convert import tables
from blip3o_jax.convert.stock_config import ConfigLayout, check_object, refuse
from blip3o_jax.convert.tables import Rule
from blip3o_jax.part_registry import PART_TABLE, family_of, resolve, settings_of


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Hold one family's conversion to PyTorch and back.

    `rules` maps the part's settings to the table of its tensors. `torch_class` is "module:class" of
    the PyTorch network; classes of transformers and diffusers are created from `layout`, others
    from the settings. `layers` names the PyTorch classes whose instances are stacked in this
    package. `velocity` calls a diffusion head: (module, latents [B, C, H, W], condition tokens,
    timesteps) -> velocity. `published` holds the values of a BLIP3o-NEXT directory's config.json
    that differ from the stock class's. `buffers` maps the settings to the tensors that the stock
    class computes and stores, {name: value}.
    """

    rules: Callable[[Any], list[Rule]]
    torch_class: str
    layers: tuple[str, ...] = ()
    layout: ConfigLayout | None = None
    velocity: Callable[[Any, Any, Any, Any], Any] | None = None
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    buffers: Callable[[Any], Mapping[str, np.ndarray]] = lambda settings: {}

    @property
    def library(self) -> str:
        """Return "transformers", "diffusers" or, for a class of this package, "blip3o_jax"."""
        return self.torch_class.partition(":")[0].partition(".")[0]


QWEN3 = Conversion(
    tables.qwen3,
    "transformers:Qwen3ForCausalLM",
    ("Qwen3DecoderLayer",),
    layouts.QWEN3,
    published={"architectures": ["blip3oQwenForCausalLM"], "model_type": "blip3o_qwen"},
)
QWEN2 = Conversion(
    tables.qwen2, "transformers:Qwen2ForCausalLM", ("Qwen2DecoderLayer",), layouts.QWEN2
)
SANA = Conversion(
    tables.sana,
    "diffusers:SanaTransformer2DModel",
    ("SanaTransformerBlock",),
    layouts.SANA,
    lambda dit, z, condition, timestep: dit(z, condition, timestep=timestep).sample,
)
DC_AE = Conversion(
    tables.dc_ae, "diffusers:AutoencoderDC", ("ResBlock", "EfficientViTBlock"), layouts.DC_AE
)
TA_TOK = Conversion(
    tables.ta_tok,
    "blip3o_jax.convert.torch_parts:TaTok",
    ("SiglipEncoderLayer", "Siglip2EncoderLayer"),
)
CONNECTOR = Conversion(tables.connector, "blip3o_jax.convert.torch_parts:Connector")


def conversion_of(part: str, cfg: ModelConfig) -> Conversion:
    """Return the conversion of a part of a model."""
    found: Conversion = resolve(family_of(part, cfg).conversion)
    return found


def conversions(part: str) -> list[Conversion]:
    """Return the conversions of all families of a part."""
    return [resolve(family.conversion) for family in PART_TABLE[part].families if family.conversion]


def stacked_layers() -> set[str]:
    """Return the names of the PyTorch classes whose instances are stacked in this package."""
    return {name for part in tables.PREFIXES for c in conversions(part) for name in c.layers}


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


def read_stock_config(part: str, values: Any, where: str) -> Any:
    """Return the settings of a part from the values of the config.json `where`.

    The family is that of the class that the file names, or the first one if it names none. Raises
    UserError for values that are not supported.
    """
    check_object(values, where)
    found = [c.layout for c in conversions(part) if c.layout is not None]
    for layout in found:
        if values.get(layout.kind, found[0].fixed[layout.kind][0]) in layout.fixed[layout.kind]:
            return layout.read(values, where)
    kind = found[0].kind
    refuse(where, kind, values[kind], tuple(v for layout in found for v in layout.fixed[kind]))
