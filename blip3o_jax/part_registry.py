"""Define the table of the model's parts and their families.

A part is a network with a place in the model; a family is one architecture of it, chosen by the
type of its settings (`model_type` in JSON and on the command line). A row names the network, its
conversion and the parameters that stay constant; nothing else in the package names a family.
Names are "module:attribute" and resolved when they are used, so that the table imports none of what
stands above or below it.
"""

import dataclasses
import functools
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from blip3o_jax.config import ModelConfig, PartConfig
from blip3o_jax.config.ar import Qwen2Config, Qwen3Config
from blip3o_jax.config.dit import MMDiTConfig, SanaConfig
from blip3o_jax.config.image_tokens import TaTokConfig
from blip3o_jax.config.vae import DcAeConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """Hold one architecture of a part.

    `settings`: the type of its configuration. `network`: its `nnx.Module`, made as
    `network(settings, *more, rngs=rngs)`, which has the part's protocol. `conversion`: its
    `convert.conversions.Conversion`, "" without a stock class. `constant`: the paths
    of parameters that keep their initial values in training unless the configuration names them.
    """

    settings: type
    network: str
    conversion: str = ""
    constant: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PartSpec:
    """Hold the description of a part of the model.

    `field` is the field of `ModelConfig` that holds its settings; the first of `families` is the
    default. `seed_index` is folded into the key of the initial weights; every part has its own,
    which no later part takes again. `arguments` returns the network's positional and keyword
    arguments other than `rngs`; None means its settings alone. `strategies` replaces a strategy's
    table for this part: {strategy: table of parallel/rules.py}.
    """

    field: str
    families: tuple[Family, ...]
    _: dataclasses.KW_ONLY
    seed_index: int
    arguments: Callable[[ModelConfig], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    strategies: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _connector(cfg: ModelConfig) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (cfg.connector, cfg.ar.hidden_size, cfg.dit.caption_channels), {}


def _latent_connector(cfg: ModelConfig) -> tuple[tuple[Any, ...], dict[str, Any]]:
    plain = dataclasses.replace(cfg.connector, positions=False)
    return (plain, cfg.vae.latent_channels, cfg.dit.caption_channels), {"axis": None}


def _feature_connector(cfg: ModelConfig) -> tuple[tuple[Any, ...], dict[str, Any]]:
    plain = dataclasses.replace(cfg.connector, positions=False)
    return (plain, cfg.tokenizer.feature_channels, cfg.ar.hidden_size), {}


def _text_tower(cfg: ModelConfig) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (cfg.text_tower, cfg.ar.vocab_size, cfg.tokenizer.feature_channels), {}


def _connectors(conversion: str) -> tuple[Family, ...]:
    """Return the one family of a connector; each of them has its conversion."""
    return (
        Family(
            type(ModelConfig().connector),
            "blip3o_jax.connector:Connector",
            f"blip3o_jax.convert.conversions:{conversion}",
        ),
    )


# An encoder's heads and feed-forward are not sharded: it is small compared with its activations.
_ENCODER = {"fsdp_tp": "fsdp"}
# The tokens of a row, or of a map of latents, are sharded.
_SEQUENCE = {"fsdp_sp": "fsdp_sp"}

# Not of a part: the initial embeddings of image tokens from the codes (blip3o.py).
IMAGE_EMBEDDING_SEED_INDEX = 9
PART_TABLE: dict[str, PartSpec] = {
    "tokenizer": PartSpec(
        "tokenizer",
        (
            Family(
                TaTokConfig,
                "blip3o_jax.image_tokens.ta_tok:TaTok",
                "blip3o_jax.convert.ta_tok:CONVERSION",
                # SimVQ learns the projection of its embedding alone (arXiv 2411.02038).
                constant=("bottleneck/codebook/embedding",),
            ),
        ),
        seed_index=0,
        strategies=_ENCODER,
    ),
    "text_tower": PartSpec(
        "text_tower",
        (Family(type(ModelConfig().text_tower), "blip3o_jax.image_tokens.contrastive:TextTower"),),
        seed_index=1,
        arguments=_text_tower,
        strategies=_ENCODER,
    ),
    "ar": PartSpec(
        "ar",
        (
            Family(
                Qwen3Config,
                "blip3o_jax.ar.qwen3:Qwen3",
                "blip3o_jax.convert.conversions:QWEN3",
            ),
            Family(
                Qwen2Config,
                "blip3o_jax.ar.qwen2:Qwen2",
                "blip3o_jax.convert.conversions:QWEN2",
            ),
        ),
        seed_index=2,
        strategies=_SEQUENCE,
    ),
    "connector": PartSpec(
        "connector", _connectors("CONNECTOR"), seed_index=3, arguments=_connector
    ),
    "dit": PartSpec(
        "dit",
        (
            Family(
                SanaConfig,
                "blip3o_jax.dit.sana:SanaTransformer",
                "blip3o_jax.convert.conversions:SANA",
            ),
            Family(
                MMDiTConfig, "blip3o_jax.dit.mmdit:MMDiT", "blip3o_jax.convert.mmdit:CONVERSION"
            ),
        ),
        seed_index=4,
        strategies=_SEQUENCE,
    ),
    # Replicated: it is small compared with its activations.
    "vae": PartSpec(
        "vae",
        (Family(DcAeConfig, "blip3o_jax.vae.dc_ae:DcAe", "blip3o_jax.convert.conversions:DC_AE"),),
        seed_index=5,
        strategies={"fsdp": "dp", "fsdp_tp": "dp", "fsdp_sp": "dp"},
    ),
    "patch_readout": PartSpec(
        "tokenizer",
        (Family(PartConfig, "blip3o_jax.image_tokens.contrastive:PatchReadout"),),
        seed_index=6,
        strategies=_ENCODER,
    ),
    "latent_connector": PartSpec(
        "connector",
        _connectors("LATENT_CONNECTOR"),
        seed_index=7,
        arguments=_latent_connector,
    ),
    "feature_connector": PartSpec(
        "connector",
        _connectors("FEATURE_CONNECTOR"),
        seed_index=8,
        arguments=_feature_connector,
    ),
}


def settings_of(part: str, cfg: ModelConfig) -> Any:
    """Return the settings of a part."""
    return getattr(cfg, PART_TABLE[part].field)


def family_of(part: str, cfg: ModelConfig) -> Family:
    """Return the family of a part that has the type of its settings in `cfg`.

    Raises TypeError if the table has none.
    """
    settings = settings_of(part, cfg)
    for family in PART_TABLE[part].families:
        if isinstance(settings, family.settings):
            return family
    raise TypeError(
        f"part {part!r} has no family for {type(settings).__name__}: see part_registry.py"
    )


def make_part(part: str, cfg: ModelConfig, rngs: Any) -> Any:
    """Return the network of a part, an `nnx.Module` with initial weights."""
    arguments = PART_TABLE[part].arguments
    positional, named = arguments(cfg) if arguments else ((settings_of(part, cfg),), {})
    return resolve(family_of(part, cfg).network)(*positional, **named, rngs=rngs)


@functools.cache
def resolve(name: str) -> Any:
    """Return the object that "module:attribute" names."""
    return pkgutil.resolve_name(name)
