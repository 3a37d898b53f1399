"""Read and check the config.json of stock classes for an import, and write it for an export.

Needs no torch. conversions.py assigns a layout to each family of a part. Every field of a stock
class is in one of three tables: `fields` are copied, `fixed` must have one of the listed values
(the first is the class's default), since this package supports no other, and `ignored` has no
effect. Keys in none of them are for other readers of the file (`dtype`, `transformers_version`, the
ids of image tokens) and are ignored.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from blip3o_jax import config
from blip3o_jax.config import (
    DcAeConfig,
    FlowConfig,
    Qwen2Config,
    Qwen3Config,
    QwenConfig,
    SanaConfig,
    UserError,
)

# Fields that this package adds to those of the stock classes.
OWN_FIELDS = frozenset(
    {
        "dtype",
        "param_dtype",
        "remat",
        "unroll",
        "attention",
        "vocab_multiple",
        "embedding_range",
        "lora",
    }
)
REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class ConfigLayout:
    """Hold how the config.json of one stock class is read into `cls`."""

    cls: type
    fields: dict[str, Any]  # name -> the stock class's default, or REQUIRED
    fixed: dict[str, tuple[Any, ...]]
    ignored: frozenset[str]
    # (values of a file, its path) -> fields that are derived from several keys.
    computed: Callable[[dict[str, Any], str], dict[str, Any]] = lambda values, where: {}
    # (layout, settings) -> keys to write in addition to `fields`, in place of the defaults of
    # `fixed`.
    stated: "Callable[[ConfigLayout, Any], dict[str, Any]] | None" = None
    # Values to write that `stated` takes from here.
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kind: str = "_class_name"  # the key of `fixed` that names the class

    def write(self, settings: Any) -> dict[str, Any]:
        """Return the fields (JSON values) that the stock class is built from."""
        if self.stated is not None:
            return self.stated(self, settings) | _taken(self, settings)
        return {key: values[0] for key, values in self.fixed.items()} | _taken(self, settings)

    def read(self, values: Any, where: str) -> Any:
        """Return the settings of the values of the file `where`.

        Raises UserError, naming file and key, for values that are not supported.
        """
        check_object(values, where)
        return _read(self, values, where, self.computed(values, where))


def _qwen_stated(layout: ConfigLayout, cfg: QwenConfig) -> dict[str, Any]:
    """Return the keys of a Qwen's config.json other than its sizes.

    The rotary base is written in the forms of both transformers 4 and 5.
    """
    named = ("model_type", "hidden_act", "attention_bias", "attention_dropout")
    return {
        **{key: layout.fixed[key][0] for key in named if key in layout.fixed},
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": cfg.num_hidden_layers,
        "layer_types": ["full_attention"] * cfg.num_hidden_layers,
        "use_cache": True,
        **layout.written,
    }


def _qwen_computed(values: dict[str, Any], where: str) -> dict[str, Any]:
    kinds = values.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list | tuple) or any(kind != "full_attention" for kind in kinds)
    ):
        raise UserError(
            f"{where}: layer_types={kinds!r} is not supported: only a list of 'full_attention' can "
            "be converted"
        )
    computed: dict[str, Any] = {"rope_theta": _rope_theta(values, where)}
    if values.get("num_key_value_heads", REQUIRED) is None:
        computed["num_key_value_heads"] = values.get("num_attention_heads")
    return computed


def _sana_computed(values: dict[str, Any], where: str) -> dict[str, Any]:
    return {} if values.get("out_channels") else {"out_channels": values.get("in_channels")}


def _dc_ae_computed(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert keys that may hold one value, or one for each stage, to this package's form."""
    computed: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        kind, channels = values.get(f"{side}_block_types"), values.get(f"{side}_block_out_channels")
        if isinstance(kind, str) and isinstance(channels, list | tuple):
            computed[f"{side}_block_types"] = [kind] * len(channels)
    for key in ("decoder_norm_types", "decoder_act_fns"):
        value = values.get(key)
        if isinstance(value, list | tuple):
            if len(set(map(str, value))) != 1:
                raise UserError(
                    f"{where}: {key}={value!r} differs between stages: only one value for all can "
                    "be converted"
                )
            computed[key] = value[0]
    return computed


QWEN3 = ConfigLayout(
    Qwen3Config,
    fields={
        "vocab_size": REQUIRED,
        "hidden_size": REQUIRED,
        "intermediate_size": REQUIRED,
        "num_hidden_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "num_key_value_heads": REQUIRED,
        "head_dim": REQUIRED,
        "rms_norm_eps": REQUIRED,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    fixed={
        # The latter three are the reference's own names for training, sampling and GRPO.
        "model_type": ("qwen3", "blip3o_qwen", "blip3o_qwen_inference", "blip3o_qwen_grpo"),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "attention_dropout": (0.0,),
        "use_sliding_window": (False,),
        "partial_rotary_factor": (None, 1.0),
        "quantization_config": (None,),
    },
    ignored=frozenset(
        {
            "rope_theta",  # these three by `_rope_theta`
            "rope_parameters",
            "rope_scaling",
            "layer_types",  # by `_qwen_computed`
            "max_position_embeddings",  # no table of positions is stored
            "use_cache",
            "sliding_window",  # read with use_sliding_window only, as is the next
            "max_window_layers",
            "pad_token_id",  # of the text tokenizer
            "bos_token_id",
            "eos_token_id",
        }
    ),
    computed=_qwen_computed,
    stated=_qwen_stated,
    written={"max_position_embeddings": 40960},
    kind="model_type",
)
# Qwen2 has neither a key for biases nor one for the size of heads.
QWEN2 = dataclasses.replace(
    QWEN3,
    cls=Qwen2Config,
    fields={key: default for key, default in QWEN3.fields.items() if key != "head_dim"},
    fixed={key: values for key, values in QWEN3.fixed.items() if key != "attention_bias"}
    | {"model_type": ("qwen2",)},
    written={"max_position_embeddings": 32768},
)
SANA = ConfigLayout(
    SanaConfig,
    fields={
        "in_channels": REQUIRED,
        "out_channels": None,
        "num_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "attention_head_dim": REQUIRED,
        "num_cross_attention_heads": REQUIRED,
        "cross_attention_head_dim": REQUIRED,
        "cross_attention_dim": REQUIRED,
        "caption_channels": REQUIRED,
        "mlp_ratio": REQUIRED,
        "sample_size": REQUIRED,
        "patch_size": REQUIRED,
        "interpolation_scale": None,
        "qk_norm": None,
    },
    fixed={
        "_class_name": ("SanaTransformer2DModel",),
        "dropout": (0.0,),
        "attention_bias": (False,),
        "norm_elementwise_affine": (False,),
        "norm_eps": (1e-6,),
        "guidance_embeds": (False,),
        "timestep_scale": (1.0,),
    },
    ignored=frozenset({"guidance_embeds_scale"}),  # read with guidance_embeds only
    computed=_sana_computed,
)
DC_AE = ConfigLayout(
    DcAeConfig,
    fields={
        name: REQUIRED
        for name in (field.name for field in dataclasses.fields(DcAeConfig))
        if name not in OWN_FIELDS
    },
    fixed={
        "_class_name": ("AutoencoderDC",),
        "encoder_out_shortcut": (True,),
        "decoder_in_shortcut": (True,),
        "decoder_conv_act_fn": ("relu",),
    },
    ignored=frozenset(),
    computed=_dc_ae_computed,
)
# The scheduler config published with SANA is of `DPMSolverMultistepScheduler`. The reference reads
# it with the flow-matching class, which ignores its `flow_shift`. So `_class_name` is not checked,
# and DPM's `prediction_type` must only be compatible.
SCHEDULER = ConfigLayout(
    FlowConfig,
    fields={"num_train_timesteps": 1000, "shift": 1.0},
    fixed={
        "prediction_type": (None, "flow_prediction"),
        "use_dynamic_shifting": (False,),
        "shift_terminal": (None,),
        "invert_sigmas": (False,),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "stochastic_sampling": (False,),
    },
    # All of these are read with use_dynamic_shifting only.
    ignored=frozenset(
        {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"}
    ),
    stated=lambda layout, cfg: {"_class_name": "FlowMatchEulerDiscreteScheduler"},
)


def _taken(layout: ConfigLayout, part: Any) -> dict[str, Any]:
    return {key: config.to_dict(getattr(part, key)) for key in layout.fields}


def _rope_theta(values: dict[str, Any], where: str) -> Any:
    """Return the rotary base, of `rope_parameters` (transformers 5) or the top level.

    Raises UserError for scaled or partial rotary positions.
    """
    inner: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if values.get(key) is None:
            continue
        if not isinstance(values[key], dict):
            raise UserError(f"{where}: {key}={values[key]!r} must be a group of fields, or null")
        inner |= values[key]
        for name, value in values[key].items():
            if name in ("rope_type", "type"):
                known = value in ("default", None)
            else:
                known = name == "rope_theta" or (
                    name == "partial_rotary_factor" and value in (None, 1.0)
                )
            if not known:
                raise UserError(
                    f"{where}: {key}.{name}={value!r} is not supported: only plain rotary "
                    "positions (rope_type 'default') can be converted"
                )
    theta = inner.get("rope_theta", values.get("rope_theta"))
    if theta is None:
        raise UserError(
            f"{where}: lacks rope_theta (or rope_parameters.rope_theta): add the base the model "
            "was trained with"
        )
    return theta


def _read(
    layout: ConfigLayout, values: dict[str, Any], where: str, computed: dict[str, Any]
) -> Any:
    """Return the dataclass of `layout`; `computed` has precedence over `values`."""
    for key, allowed in layout.fixed.items():
        if values.get(key, allowed[0]) not in allowed:
            refuse(where, key, values[key], allowed)
    missing = [
        key for key, default in layout.fields.items() if default is REQUIRED and key not in values
    ]
    if missing:
        raise UserError(
            f"{where}: lacks {', '.join(missing)}: use the file that was published or saved with "
            "the weights"
        )
    taken = {key: values.get(key, default) for key, default in layout.fields.items()} | computed
    for key, value in taken.items():
        _check_numbers(where, key, value)
    try:
        return config.from_dict(taken, layout.cls)
    except config.ConfigError as error:
        raise UserError(f"{where}: {error}") from None


def check_object(values: Any, where: str) -> None:
    """Raise UserError unless a file holds a JSON object."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold a JSON object ({{...}}), not {type(values).__name__}")


def _check_numbers(where: str, key: str, value: Any) -> None:
    """Raise UserError unless numbers are positive.

    A stage may have 0 layers, and the initial weights a deviation of 0.
    """
    if isinstance(value, list | tuple):
        for item in value:
            _check_numbers(where, key, item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        zero = key.endswith("layers_per_block") or key == "initializer_range"
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise UserError(
                f"{where}: {key}={value!r} must be a finite number "
                f"{'of 0 or more' if zero else 'above 0'}"
            )


def refuse(where: str, key: str, value: Any, allowed: tuple[Any, ...]) -> NoReturn:
    """Raise UserError for a key of the file `where` whose value is none of `allowed`."""
    options = " or ".join(repr(v) for v in allowed)
    raise UserError(
        f"{where}: {key}={value!r} is not supported: only a model with {key}={options} can be "
        "converted"
    )
