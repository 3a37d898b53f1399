import dataclasses
import json
import pathlib

import pytest

from blip3o_jax import config, config_file

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"

# Every kind of field away from its default: a group, a nested tuple, a tuple of groups, an optional.
UNUSUAL = config.Config(
    stage="tokenizer",
    trainable=("tokenizer/.*",),
    model=config.ModelConfig(
        vae=config.DcAeConfig(encoder_qkv_multiscales=((), (3, 5), (), (), (), ())),
        dit=config.SanaConfig(qk_norm=None),
    ),
    data=config.DataConfig(path="a", sources=(config.SourceConfig(path="b", weight=0.5),)),
    checkpoint=config.CheckpointConfig(init_from=(("ar", "runs/ar"),)),
)


@pytest.mark.parametrize("value", (config.Config(), UNUSUAL))
def test_round_trips(value):
    assert config.from_dict(config.to_dict(value)) == value
    assert config.from_dict(json.loads(json.dumps(config.to_dict(value)))) == value
    assert config.from_dict(config.to_config_dict(value)) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepps": 1}, "unknown config key stepps: did you mean steps?"),
        ({"model": {"vae": {"latent_chanels": 4}}}, "did you mean model.vae.latent_channels?"),
        ({"loss": {"zzz": 1}}, "unknown config key loss.zzz: it takes ce, flow"),
        ({"steps": 1.5}, "steps=1.5 must be of type int"),
        ({"steps": True}, "steps=True must be of type int"),
        ({"optimizer": {"learning_rate": "1e-4"}}, "optimizer.learning_rate='1e-4' must be of type float"),
        ({"data": 3}, "data must be a group of fields, not 3"),
        ({"checkpoint": {"init_from": [["ar"]]}}, "checkpoint.init_from[0]=['ar'] must hold 2 values"),
        ({"stage": "jiont"}, "stage='jiont' is not one of autoencoder, contrastive, tokenizer, joint"),
        ({"model": {"image_size": 1000}}, "model.image_size=1000 must be a multiple of the autoencoder's 32"),
        (
            {"loss": {"caption_dropout": 10.0}},
            "loss.caption_dropout=10.0 is a share of the rows: it must lie between 0 and 1",
        ),
        (
            {"loss": {"caption_dropout": 0.1}, "model": {"template": {"supervise_prompt": True}}},
            "loss.caption_dropout hides prompts that model.template.supervise_prompt trains on",
        ),
        ({"optimizer": {"name": "moun"}}, "optimizer.name='moun' is not one of adamw, muon"),
        ({"checkpoint": {"image_rows": "code"}}, "checkpoint.image_rows='code' is not one of drawn, codes"),
        (
            {"stage": "tokenizer", "checkpoint": {"image_rows": "codes"}},
            "checkpoint.image_rows='codes' belongs to stage 'joint'; stage 'tokenizer' has no AR",
        ),
        ({"data": {"batch_size": 6}, "optimizer": {"accumulate": 4}}, "must be a multiple of optimizer.accumulate=4"),
        (
            {"data": {"cache_dir": "cache"}, "model": {"editing": {"references": 1, "features": True}}},
            "data.cache_dir keeps no features, which model.editing.features reads",
        ),
        ({"rl": {"refill": 1, "stale": True}}, "rl.refill looks at rewards before the next rollout, rl.stale after"),
    ],
)
def test_a_bad_value_is_one_line_that_names_its_field(values, message):
    with pytest.raises(config.ConfigError) as error:
        config.from_dict(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_whole_number_is_a_valid_float():
    got = config.from_dict({"optimizer": {"learning_rate": 1}})
    assert got.optimizer.learning_rate == 1.0 and isinstance(got.optimizer.learning_rate, float)


def test_published_grids():
    tokenizer = config.TaTokConfig()
    sides = [dataclasses.replace(tokenizer, pool_scale=scale).grid for scale in (1, 2, 3)]
    assert sides == [27, 13, 9] and tokenizer.num_tokens == 729
    assert config.ModelConfig().latent_size == 32
    assert config.Qwen3Config().padded_vocab_size == 217600  # 425 x 512, the first multiple above 217210


@pytest.mark.parametrize(("size", "width", "mlp"), [("0.6b", 1024, 3072), ("1.7b", 2048, 6144)])
def test_published_recipes(size, width, mlp):
    pretrain = config_file.load(f"{CONFIGS}/pretrain.py:{size}")
    instruct = config_file.load(f"{CONFIGS}/instruct.py:{size}")
    for recipe, steps, batch in ((pretrain, 336_000, 512), (instruct, 7_000, 128)):
        assert (recipe.steps, recipe.data.batch_size, recipe.data.max_length) == (steps, batch, 2048)
        assert (recipe.optimizer.learning_rate, recipe.optimizer.end_learning_rate) == (5e-5, 1e-5)
        assert (recipe.optimizer.warmup_share, recipe.optimizer.weight_decay) == (0.01, 0.0)
        assert (recipe.model.ar.hidden_size, recipe.model.ar.intermediate_size) == (width, mlp)
        assert recipe.model.tokenizer.encoder.param_dtype == recipe.model.vae.param_dtype == "bfloat16"
        # The prompt, its template and 729 image tokens with their tags must leave room for a long caption.
        assert recipe.data.max_length - recipe.model.tokenizer.num_tokens > 1000


def test_an_unknown_size_names_those_there_are():
    with pytest.raises(config.ConfigError, match=r"size='7b' is not one of 0\.6b, 1\.7b"):
        config_file.load(f"{CONFIGS}/pretrain.py:7b")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", (-0.1, float("nan"), float("inf"))),
        ("top_k", (-1,)),
        ("top_p", (0.0, 2.0, -1.0, float("nan"))),
        ("steps", (0, -3)),
        ("guidance", (float("inf"), float("nan"))),
        ("token_guidance", (float("inf"), float("nan"))),
        ("batch_size", (0,)),
    ],
)
def test_sampling_settings_that_cannot_work_are_refused_by_name(field, values):
    for value in values:
        with pytest.raises(config.ConfigError, match=f"sampling.{field}="):
            config.from_dict({"sampling": {field: value}})


def test_the_edges_of_sampling_settings_are_accepted():
    config.SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, steps=1, guidance=0.0, batch_size=1)
