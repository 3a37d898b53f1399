"""Read the options of the vision tokenizer: published ones, a TA-Tok file's args, a user's file.

The args are those of the published class: {"bottleneck": {"name", "args": {..., "regularizer":
{"name", "args"}}}, ...}.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from blip3o_jax import config as config_lib
from blip3o_jax.config import TaTokConfig, UserError
from blip3o_jax.convert.tensor_files import read_json

OVERRIDES = (
    "encoder",
    "decoder",
    "bottleneck_dim",
    "codebook_size",
    "select_layer",
    "l2_normalized",
)
# Path in the args -> field here.
_FIELDS = {
    "bottleneck.args.bottleneck_dim": "bottleneck_dim",
    "bottleneck.args.regularizer.args.codebook_size": "codebook_size",
    "bottleneck.args.regularizer.args.l2_normalized": "l2_normalized",
    "bottleneck.args.regularizer.args.stochastic": "stochastic",
    "bottleneck.args.regularizer.args.stochastic_temperature": "stochastic_temperature",
    "pool_scale": "pool_scale",
    "select_layer_id": "select_layer",
    "decoder_depth": "decoder.num_hidden_layers",
    "input_size": "encoder.image_size",
}
# Path -> supported values, if present.
_FIXED: dict[str, tuple[Any, ...]] = {
    "bottleneck.name": ("bottleneck",),
    "bottleneck.args.norm": ("none", None),
    "bottleneck.args.regularizer.name": ("simvq",),
}
# Options of training, or of the published loader only.
_IGNORED = {
    # The sizes imply the number of tokens; the published class's default contradicts them.
    "bottleneck_token_num",
    "teacher",
    "ckpt_path",
    "rand_scale",
    "input_type",
    *(
        f"bottleneck.args.regularizer.args.{name}"
        for name in (
            "commitment_loss_weight",
            "codebook_loss_weight",
            "entropy_loss_weight",
            "entropy_loss_temperature",
            "same_index_shape",
            "top_k",
            "top_k_prob",
            "residual_weight",
        )
    ),
}


def read_ta_tok(
    base: TaTokConfig, args: Mapping[str, Any], override: pathlib.Path | None
) -> TaTokConfig:
    """Return `base` updated by `args`, then by the JSON file `override` (--ta_tok_config).

    Raises UserError for unknown options and values.
    """
    flat = _flat(args)
    for path, value in flat.items():
        if path in _FIXED and value not in _FIXED[path]:
            raise UserError(
                f"TA-Tok args: {path}={value!r} is not supported: it must be {_FIXED[path][0]!r}"
            )
        if path not in _FIXED and path not in _FIELDS and path not in _IGNORED:
            raise UserError(
                f"TA-Tok args: {path}={value!r} is unknown and may change the tokenizer's outputs: "
                "remove it from the args if it does not"
            )
    where = "TA-Tok args"
    merged = config_lib.to_dict(base)
    _merge(merged, {f: flat[p] for p, f in _FIELDS.items() if flat.get(p) is not None}, where)
    if override is not None:
        given = read_json(override)
        for key in given:
            config_lib.check_choice(f"{override}: key", key, OVERRIDES)
        _merge(merged, _flat(given), str(override))
        where = f"{where} and {override}"
    # Validated after both, since a size in the file may only be valid with another in the args.
    try:
        return config_lib.from_dict(merged, TaTokConfig)
    except config_lib.ConfigError as error:
        raise config_lib.ConfigError(f"{where}: {error}") from None


def args_of(cfg: TaTokConfig) -> dict[str, Any]:
    """Return the published class's args: the inverse of `read_ta_tok`."""
    options = ("codebook_size", "l2_normalized", "stochastic", "stochastic_temperature")
    regularizer = {"name": "simvq", "args": {name: getattr(cfg, name) for name in options}}
    bottleneck = {"bottleneck_dim": cfg.bottleneck_dim, "norm": "none", "regularizer": regularizer}
    return {
        "bottleneck": {"name": "bottleneck", "args": bottleneck},
        "bottleneck_token_num": cfg.encoder.grid**2,
        "input_size": cfg.encoder.image_size,
        "pool_scale": cfg.pool_scale,
        "decoder_depth": cfg.decoder.num_hidden_layers,
        "select_layer_id": cfg.select_layer,
    }


def overrides_of(cfg: TaTokConfig) -> dict[str, Any]:
    """Return the contents of a --ta_tok_config file with all of `cfg`'s options."""
    return {key: config_lib.to_dict(getattr(cfg, key)) for key in OVERRIDES}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten nested groups to {"a.b": value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{above}{key}.")
            if isinstance(value, Mapping)
            else {f"{above}{key}": value}
        )
    return flat


def _merge(fields: dict[str, Any], values: Mapping[str, Any], where: str) -> None:
    """Replace the fields at dotted paths, in place."""
    for path, value in values.items():
        *above, name = path.split(".")
        group: Any = fields
        for key in above:
            group = group.get(key)
            config_lib.check(isinstance(group, dict), f"{where}: {key} is not a group of fields")
        group[name] = value
