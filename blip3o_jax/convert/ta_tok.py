"""Convert TA-Tok: its tensors, its scaling layer, and the file that it is published in.

The file is {"model": {"args": ..., "sd": state dict}} of PyTorch, or safetensors with an args.json.
Its args are those of the published class: {"bottleneck": {"name", "args": {..., "regularizer":
{"name", "args"}}}, ...}. They do not state the sizes of its networks: those are the published ones,
or come from a JSON file of the user's (--ta_tok_config).
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax import config as config_lib
from blip3o_jax.config import TaTokConfig, UserError
from blip3o_jax.convert.conversions import Conversion, OpenedFile, PartFile
from blip3o_jax.convert.tables import Rule, linear, norm, prefixed
from blip3o_jax.convert.tensor_files import Tensor, load_torch, read_json, torch_tensors
from blip3o_jax.convert.weight_files import WeightFile, read_weights
from blip3o_jax.files import write_json

NAME = "ta_tok"  # of the file, and of its directory in an export
# The scaling layer maps pixels to [-1, 1]: those of a BLIP3o-NEXT directory are in that range
# already, those that the published file's own code passes are in [0, 1].
_SCALE_LAYER = {"scale_layer.shift": 0.0, "scale_layer.scale": 1.0}
_OWN_SCALE_LAYER = {"scale_layer.shift": 0.5, "scale_layer.scale": 0.5}

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

# Of the stock class's `MultiheadAttention`, which stores query, key and value as one.
_POOL = ("attention/query", "attention/key", "attention/value")


def _vision_model(patch_layout: str) -> list[Rule]:
    """Return the rules of `transformers.SiglipVisionModel` ("patch") or `Siglip2VisionModel`
    ("linear").
    """
    layer, here = "encoder.layers.{i}.", "encoder/layers/"
    attention = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"))
    return [
        *linear("embeddings.patch_embedding", "patch_embedding", patch_layout),
        Rule("embeddings.position_embedding.weight", ("position_embedding",)),
        *norm(f"{layer}layer_norm1", f"{here}norm1", bias=True),
        *(
            r
            for torch, path in attention
            for r in linear(f"{layer}self_attn.{torch}", f"{here}attention/{path}")
        ),
        *norm(f"{layer}layer_norm2", f"{here}norm2", bias=True),
        *linear(f"{layer}mlp.fc1", f"{here}mlp/up"),
        *linear(f"{layer}mlp.fc2", f"{here}mlp/down"),
        *norm("post_layernorm", "post_layernorm", bias=True),
        Rule("head.probe", ("head/probe",), "probe"),
        # torch's `MultiheadAttention` stores query, key and value in one tensor, in this order.
        Rule("head.attention.in_proj_weight", tuple(f"head/{p}/kernel" for p in _POOL), "linear"),
        Rule("head.attention.in_proj_bias", tuple(f"head/{p}/bias" for p in _POOL)),
        *linear("head.attention.out_proj", "head/attention/out"),
        *norm("head.layernorm", "head/norm", bias=True),
        *linear("head.mlp.fc1", "head/mlp/up"),
        *linear("head.mlp.fc2", "head/mlp/down"),
    ]


def rules(cfg: TaTokConfig) -> list[Rule]:
    """Return the rules of TA-Tok; its SigLIP classes lie one level deeper in the decoder than in
    the encoder.
    """
    return [
        *prefixed("encoder.", "encoder/", _vision_model("patch")),
        *linear("encode_task_layer.0", "encode_task_layer"),
        *linear("bottleneck.in_linear", "bottleneck/in_linear"),
        Rule("bottleneck.regularizer.embedding.weight", ("bottleneck/codebook/embedding",)),
        *linear("bottleneck.regularizer.embedding_proj", "bottleneck/codebook/embedding_proj"),
        *linear("bottleneck.out_linear", "bottleneck/out_linear"),
        *prefixed("decoder.vision_model.", "decoder/", _vision_model("linear")),
        *linear("decode_task_layer.0", "decode_task_layer1"),
        *linear("decode_task_layer.2", "decode_task_layer2"),
    ]


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


def open_file(path: pathlib.Path) -> OpenedFile:
    """Read the args and the headers of a TA-Tok file, or of the file in a directory of one."""
    file = path
    if path.is_dir():
        candidates = [path / f"{NAME}{suffix}" for suffix in (".pth", ".safetensors")]
        file = next((found for found in candidates if found.is_file()), path)
    if file.is_dir() or file.suffix == ".safetensors":
        args = file.with_name("args.json")
        tensors, weights = read_weights(file)
        return OpenedFile(file, read_json(args) if args.is_file() else {}, tensors, weights)
    model = _load(file)
    tensors = torch_tensors(model["sd"], file)
    return OpenedFile(file, dict(model["args"]), tensors, WeightFile(file, "", ()))


def _load(file: pathlib.Path) -> dict[str, Any]:
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


def torch_state(file: pathlib.Path) -> Mapping[str, Any]:
    """Return {name: torch tensor} of a TA-Tok file of PyTorch."""
    state: Mapping[str, Any] = _load(file)["sd"]
    return state


def finish_file(directory: pathlib.Path, cfg: TaTokConfig) -> Sequence[str]:
    """Complete an export of `directory`/ta_tok.safetensors to the published file, with the sizes
    next to it; return notes for the user.

    Without torch the file remains, and the args are written next to it.
    """
    write_json(directory / "ta_tok_config.json", overrides_of(cfg))
    args = args_of(cfg)
    file = directory / f"{NAME}.safetensors"
    try:
        import torch
        from safetensors.torch import load_file
    except ImportError:
        write_json(directory / "args.json", args)
        return (
            f"{NAME} is {file.name} with args.json: install PyTorch to export the published "
            f"{NAME}.pth",
        )
    torch.save({"model": {"args": args, "sd": load_file(file)}}, directory / f"{NAME}.pth")
    file.unlink()
    return ()


def check_scale_layer(key: str, tensor: Tensor) -> None:
    """Raise UserError unless a scaling layer maps to [-1, 1].

    It must map pixels from [0, 1] or be the identity, since this package passes pixels in [-1, 1].
    """
    if key not in _SCALE_LAYER:
        return
    allowed = (_SCALE_LAYER[key], _OWN_SCALE_LAYER[key])
    if not any(np.all(tensor.read() == value) for value in allowed):
        raise UserError(
            f"{tensor.file}: {tensor.key} is {tensor.read().reshape(-1).tolist()}, but the vision "
            f"tokenizer takes pixels in [-1, 1]: it must be {' or '.join(map(str, allowed))}"
        )


def _scale_layer(values: Mapping[str, float]) -> dict[str, np.ndarray]:
    return {key: np.full((1, 3, 1, 1), value, np.float32) for key, value in values.items()}


CONVERSION = Conversion(
    rules,
    "blip3o_jax.convert.torch_parts:TaTok",
    prefix="model.vision_tower.vision_tower.",
    layers=("SiglipEncoderLayer", "Siglip2EncoderLayer"),
    # Saved with transformers 5, the decoder lacks a level; with early releases the encoder has it.
    spellings=(
        ("decoder.vision_model.", "decoder."),
        ("encoder.", "encoder.vision_model."),
    ),
    unread=(
        "scale_layer.",
        "teacher.",
        "encoder.embeddings.position_ids",
        "decoder.vision_model.embeddings.position_ids",
    ),
    check_unread=check_scale_layer,
    constants=_scale_layer(_SCALE_LAYER),
    config_keys=lambda cfg: {
        "mm_vision_tower": None,
        "mm_hidden_size": cfg.feature_channels,
        "mm_vision_select_layer": cfg.select_layer,
    },
    file=PartFile(
        NAME,
        option="--ta_tok=FILE",
        sizes_option="--ta_tok_config=FILE.json",
        published="the published so400m tokenizer",
        open=open_file,
        settings=read_ta_tok,
        torch_state=torch_state,
        finish=finish_file,
        constants=_scale_layer(_OWN_SCALE_LAYER),
    ),
)
