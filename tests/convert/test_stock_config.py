"""config.json of the stock classes: both ways, every field decided, every refusal one line that
names file and key.
"""

import dataclasses
import functools
import inspect
import json
from pathlib import Path

import diffusers
import pytest
import transformers

from blip3o_jax import config
from blip3o_jax.convert import conversions
from blip3o_jax.convert import stock_config as stock
from blip3o_jax.convert.conversions import read_stock_config
from tests import tiny

CFG = tiny.model()
PUBLISHED = config.ModelConfig()
READERS = {
    "ar": (functools.partial(read_stock_config, "ar"), stock.QWEN3),
    "dit": (functools.partial(read_stock_config, "dit"), stock.SANA),
    "vae": (functools.partial(read_stock_config, "vae"), stock.DC_AE),
    "scheduler": (stock.SCHEDULER.read, stock.SCHEDULER),
}
DIFFUSERS = {
    "dit": diffusers.SanaTransformer2DModel,
    "vae": diffusers.AutoencoderDC,
    "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
}
# As published with Qwen3-1.7B, before transformers 5.
QWEN3_17B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def own_defaults(part):
    """Return what a config.json can say: this package's own fields at their defaults."""
    own = {f.name: f.default for f in dataclasses.fields(part) if f.name in stock.OWN_FIELDS}
    return dataclasses.replace(part, **own)


def expected(name, cfg):
    return own_defaults({"ar": cfg.ar, "dit": cfg.dit, "vae": cfg.vae, "scheduler": cfg.flow}[name])


@pytest.mark.parametrize("cfg", [CFG, PUBLISHED], ids=["tiny", "published"])
@pytest.mark.parametrize("name", READERS)
def test_round_trip(name, cfg):
    cfg = dataclasses.replace(cfg, flow=config.FlowConfig(shift=3.0))
    values = json.loads(json.dumps(conversions.stock_config(name, cfg)))
    assert READERS[name][0](values, "config.json") == expected(name, cfg)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_takes_every_value(name, tmp_path):
    """Check that its own file, written from what it made of ours, reads back to the same."""
    made = DIFFUSERS[name].from_config(conversions.stock_config(name, CFG))
    made.save_config(tmp_path)
    (path,) = tmp_path.iterdir()
    assert READERS[name][0](json.loads(path.read_text()), path.name) == expected(name, CFG)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_takes_every_value(tied, tmp_path):
    cfg = dataclasses.replace(
        CFG, ar=dataclasses.replace(CFG.ar, tie_word_embeddings=tied, rope_theta=5e5)
    )
    values = conversions.stock_config("ar", cfg)
    made = transformers.Qwen3Config.from_dict(dict(values))
    saved = made.to_dict()
    assert {key: saved[key] for key in values if key not in ("rope_theta", "architectures")} == {
        key: value for key, value in values.items() if key not in ("rope_theta", "architectures")
    }
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in saved, "the form of transformers 5"
    assert read_stock_config("ar", saved, "config.json") == expected("ar", cfg)


def test_published_forms():
    want = config.Qwen3Config(vocab_size=151936)
    assert read_stock_config("ar", QWEN3_17B, "config.json") == want
    blip3o = QWEN3_17B | {
        "model_type": "blip3o_qwen",
        "num_image_tokens": 65536,
        "mm_vision_tower": None,
    }
    assert read_stock_config("ar", blip3o, "config.json") == want
    many = QWEN3_17B | {"num_key_value_heads": None}
    assert read_stock_config("ar", many, "config.json").num_key_value_heads == 16
    # What is published with SANA 1.5, and the flow-matching class makes of it.
    dpm = {
        "_class_name": "DPMSolverMultistepScheduler",
        "flow_shift": 3.0,
        "num_train_timesteps": 1000,
        "beta_end": 0.02,
    }
    dpm |= {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "use_karras_sigmas": False,
    }
    assert stock.SCHEDULER.read(dpm, "scheduler_config.json") == config.FlowConfig(1000, 1.0)
    made = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dpm)
    assert (made.config.num_train_timesteps, made.config.shift) == (1000, 1.0)
    sana = conversions.stock_config("dit", CFG) | {"out_channels": None}
    assert read_stock_config("dit", sana, "config.json").out_channels == CFG.dit.in_channels
    vae = conversions.stock_config("vae", CFG) | {
        "encoder_block_types": "ResBlock",
        "decoder_norm_types": ["rms_norm"] * 3,
    }
    read = read_stock_config("vae", vae, "config.json")
    assert (read.encoder_block_types, read.decoder_norm_types) == (("ResBlock",) * 3, "rms_norm")


@pytest.mark.parametrize("name", READERS)
def test_every_stock_field_is_decided(name):
    """Require that a field that a newer release adds is put into one of the tables; defaults are
    the stock class's.
    """
    _, layout = READERS[name]
    if name == "ar":
        base = {f.name for f in dataclasses.fields(transformers.PreTrainedConfig)}
        made = transformers.Qwen3Config()
        theirs = {
            f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name not in base
        }
        theirs |= {"tie_word_embeddings": made.tie_word_embeddings, "model_type": made.model_type}
    else:
        parameters = list(inspect.signature(DIFFUSERS[name].__init__).parameters.values())[1:]
        theirs = {p.name: p.default for p in parameters}
    decided = set(layout.fields) | set(layout.fixed) | layout.ignored
    assert set(theirs) <= decided
    defaults = {key: allowed[0] for key, allowed in layout.fixed.items()}
    defaults |= {
        key: default for key, default in layout.fields.items() if default is not stock.REQUIRED
    }
    for key in defaults.keys() & theirs.keys() - {
        "out_channels"
    }:  # without it, SANA's own default is 32, and None in_channels
        assert defaults[key] == theirs[key], key


REFUSED = [
    ("ar", {"model_type": "qwen3_moe"}, "model_type='qwen3_moe' is not supported"),
    (
        "ar",
        {"hidden_act": "gelu"},
        "hidden_act='gelu' is not supported: only a model with hidden_act='silu'",
    ),
    ("ar", {"attention_bias": True}, "attention_bias=True"),
    ("ar", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("ar", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("ar", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
    ("ar", {"layer_types": 3}, "layer_types=3"),
    ("ar", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("ar", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
    ("ar", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type='yarn'"),
    ("ar", {"rope_scaling": {"type": "linear"}}, "rope_scaling.type='linear'"),
    (
        "ar",
        {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
        "rope_parameters.factor=2.0",
    ),
    (
        "ar",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        "rope_parameters.full_attention=",
    ),
    ("ar", {"rope_parameters": "default"}, "rope_parameters='default' must be a group"),
    ("ar", {"rope_parameters": None, "rope_theta": None}, "lacks rope_theta"),
    ("ar", {"vocab_size": "many"}, "vocab_size='many' must be of type int"),
    ("ar", {"hidden_size": None}, "hidden_size=None must be of type int"),
    ("ar", {"num_key_value_heads": 0}, "num_key_value_heads=0 must be a finite number above 0"),
    ("ar", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ("dit", {"_class_name": "SanaControlNetModel"}, "_class_name='SanaControlNetModel'"),
    ("dit", {"qk_norm": "layer_norm"}, "qk_norm='layer_norm' is not one of rms_norm_across_heads"),
    ("dit", {"guidance_embeds": True}, "guidance_embeds=True"),
    ("dit", {"attention_bias": True}, "attention_bias=True"),
    ("dit", {"dropout": 0.1}, "dropout=0.1"),
    ("dit", {"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
    ("dit", {"norm_eps": 1e-5}, "norm_eps=1e-05"),
    ("dit", {"timestep_scale": 0.001}, "timestep_scale=0.001"),
    ("dit", {"cross_attention_dim": None}, "cross_attention_dim=None"),
    ("dit", {"cross_attention_dim": 8}, "cross_attention_dim must equal"),
    ("dit", {"interpolation_scale": 0}, "interpolation_scale=0 must be a finite number"),
    ("vae", {"_class_name": "AutoencoderKL"}, "_class_name='AutoencoderKL'"),
    ("vae", {"encoder_block_types": "MambaBlock"}, "encoder_block_types[0]='MambaBlock'"),
    ("vae", {"decoder_norm_types": "batch_norm"}, "decoder_norm_types='batch_norm'"),
    (
        "vae",
        {"decoder_act_fns": ["silu", "relu", "silu"]},
        "decoder_act_fns=['silu', 'relu', 'silu'] differs",
    ),
    ("vae", {"decoder_act_fns": []}, "decoder_act_fns=[]"),
    ("vae", {"downsample_block_type": "avg"}, "downsample_block_type='avg'"),
    ("vae", {"encoder_out_shortcut": False}, "encoder_out_shortcut=False"),
    ("vae", {"decoder_in_shortcut": False}, "decoder_in_shortcut=False"),
    ("vae", {"decoder_conv_act_fn": "silu"}, "decoder_conv_act_fn='silu'"),
    ("vae", {"encoder_block_out_channels": [8, 0, 8]}, "encoder_block_out_channels=0 must be"),
    ("vae", {"encoder_layers_per_block": 2}, "encoder_layers_per_block=2 must be a list"),
    ("vae", {"scaling_factor": 0.0}, "scaling_factor=0.0 must be"),
    ("scheduler", {"shift": "3"}, "shift='3' must be of type float"),
    ("scheduler", {"shift": float("nan")}, "shift=nan must be"),
    ("scheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
    ("scheduler", {"use_karras_sigmas": True}, "use_karras_sigmas=True"),
    ("scheduler", {"use_exponential_sigmas": True}, "use_exponential_sigmas=True"),
    ("scheduler", {"use_beta_sigmas": True}, "use_beta_sigmas=True"),
    ("scheduler", {"invert_sigmas": True}, "invert_sigmas=True"),
    ("scheduler", {"shift_terminal": 0.1}, "shift_terminal=0.1"),
    ("scheduler", {"stochastic_sampling": True}, "stochastic_sampling=True"),
    ("scheduler", {"prediction_type": "epsilon"}, "prediction_type='epsilon'"),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), REFUSED, ids=[f"{n}-{'-'.join(c)}" for n, c, _ in REFUSED]
)
def test_refusals(name, change, message):
    read, _ = READERS[name]
    read(conversions.stock_config(name, CFG), "fine.json")
    with pytest.raises(config.UserError) as error:
        read(conversions.stock_config(name, CFG) | change, "part/config.json")
    assert str(error.value).startswith("part/config.json: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ar", "dit", "vae"])
def test_missing_keys_are_named(name):
    read, layout = READERS[name]
    for key, default in layout.fields.items():
        values = conversions.stock_config(name, CFG)
        del values[key]
        if default is stock.REQUIRED:
            with pytest.raises(config.UserError, match=rf"config.json: lacks {key}: "):
                read(values, "config.json")
        else:
            read(values, "config.json")
    with pytest.raises(config.UserError, match="must hold a JSON object"):
        read(["not", "an", "object"], "config.json")


def test_unknown_part():
    with pytest.raises(ValueError, match="part 'tokenizer'"):
        conversions.stock_config("tokenizer", CFG)


def test_needs_no_torch():
    """Export without the extra [convert]."""
    source = Path(stock.__file__).read_text(encoding="utf-8")
    assert not any(f"import {name}" in source for name in ("torch", "transformers", "diffusers"))
