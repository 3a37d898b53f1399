import dataclasses
import json
import math
import pathlib
import typing

import pytest

from blip3o_jax import blip3o, config
from blip3o_jax.config import errors, fields, loader
from blip3o_jax.parallel import rules

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"

# Every kind of field away from its default: a group, a nested tuple, a tuple of groups, an
# optional.
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
        ({"loss": {"zzz": 1}}, "unknown config key loss.zzz: loss takes ce, flow"),
        ({"rl": {"ratio": "token"}}, "unknown config key rl.ratio: rl takes policy, prompts_file,"),
        ({"rl": {"kl": 0}}, "did you mean rl.kl_coef? rl takes policy, prompts_file,"),
        ({"optimizer": {"lr": 0}}, "did you mean optimizer.learning_rate? optimizer takes name,"),
        ({"lr": 0}, "unknown config key lr: did you mean optimizer.learning_rate? the config"),
        ({"loss": {"flow_draws": 1}}, "did you mean loss.flow or loss.flow_samples? loss takes"),
        ({"steps": 1.5}, "steps=1.5 must be of type int"),
        ({"steps": True}, "steps=True must be of type int"),
        (
            {"optimizer": {"learning_rate": "1e-4"}},
            "optimizer.learning_rate='1e-4' must be of type float",
        ),
        ({"data": 3}, "data must be a group of fields, not 3"),
        (
            {"checkpoint": {"init_from": [["ar"]]}},
            "checkpoint.init_from[0]=['ar'] must hold 2 values",
        ),
        (
            {"stage": "jiont"},
            "stage='jiont' is not one of autoencoder, contrastive, tokenizer, joint",
        ),
        (
            {"model": {"image_size": 1000}},
            "model.image_size=1000 must be a multiple of the autoencoder's 32",
        ),
        (
            {"loss": {"caption_dropout": 10.0}},
            "loss.caption_dropout=10.0 must lie between 0 and 1",
        ),
        (
            {"loss": {"caption_dropout": 0.1}, "model": {"template": {"supervise_prompt": True}}},
            "loss.caption_dropout hides prompts that model.template.supervise_prompt trains on",
        ),
        (
            {"optimizer": {"mu_dtype": "bf16"}},
            "optimizer.mu_dtype='bf16' is not one of float32, bfloat16, float16; "
            "did you mean bfloat16?",
        ),
        (
            {"optimizer": {"kwargs": 3}},
            "optimizer.kwargs=3 must be keyword arguments such as "
            "\"{'momentum': 0.9, 'nesterov': True}\"",
        ),
        (
            {"optimizer": {"kwargs": {"mask": math.nan}}},
            "optimizer.kwargs holds nan, which is no finite number",
        ),
        (
            {"learning_rate": 1e-4},
            "unknown config key learning_rate: did you mean optimizer.learning_rate?",
        ),
        (
            {"batch_size": 1},
            "did you mean data.batch_size or sampling.batch_size or rl.rollout.batch_size?",
        ),
        ({"model": {"ar": {"head_dim": 7}}}, "model.ar.head_dim=7 must be even: rotary embedding"),
        (
            {"model": {"tokenizer": {"decoder": {"num_patches": 8}}}},
            "model.tokenizer.decoder.num_patches=8 must be a square number",
        ),
        (
            {"model": {"buckets": [[64, 32], [32, 64], [64, 32]]}},
            "model.buckets=((64, 32), (32, 64), (64, 32)) must not hold (64, 32) twice",
        ),
        (
            {"model": {"template": {"generate": "draw"}}},
            "model.template.generate='draw' must have {caption}, where the caption stands",
        ),
        (
            {"model": {"template": {"reconstruct": "<image><image>"}}},
            "must have <image> once, where the block of reference images stands",
        ),
        ({"rl": {"rewards": [{"weight": 0}]}}, "rl.rewards[0].weight=0.0 must not be 0"),
        (
            {"rl": {"rewards": [{"clip": [1, 1]}]}},
            "rl.rewards[0].clip=(1.0, 1.0) must be (low, high), the first below the second",
        ),
        (
            {"checkpoint": {"image_embedding_init": "code"}},
            "checkpoint.image_embedding_init='code' is not one of random, codes",
        ),
        (
            {"stage": "tokenizer", "checkpoint": {"image_embedding_init": "codes"}},
            "checkpoint.image_embedding_init='codes' belongs to stage 'joint'; "
            "stage 'tokenizer' has no AR",
        ),
        (
            {"data": {"batch_size": 6}, "optimizer": {"accumulate": 4}},
            "must be a multiple of optimizer.accumulate=4",
        ),
        (
            {
                "data": {"cache_dir": "cache"},
                "model": {"editing": {"reference_slots": 1, "features": True}},
            },
            "data.cache_dir keeps no features, which model.editing.features reads",
        ),
        (
            {"rl": {"dynamic_sampling": 1, "off_policy_steps": 1}},
            "rl.dynamic_sampling needs the rewards before the next rollout is sampled",
        ),
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
    assert (
        config.Qwen3Config().padded_vocab_size == 217600
    )  # 425 x 512, the first multiple above 217210


@pytest.mark.parametrize(
    ("size", "width", "mlp"),
    [("0.6b", 1024, 3072), ("1.7b", 2048, 6144), ("4b", 2560, 9728), ("8b", 4096, 12288)],
)
def test_published_recipes(size, width, mlp):
    pretrain = loader.load(f"{CONFIGS}/pretrain.py:{size}")
    instruct = loader.load(f"{CONFIGS}/instruct.py:{size}")
    for recipe, steps, batch in ((pretrain, 336_000, 512), (instruct, 7_000, 128)):
        assert (recipe.steps, recipe.data.batch_size, recipe.data.max_length) == (
            steps,
            batch,
            0,  # by the data
        )
        assert (recipe.optimizer.learning_rate, recipe.optimizer.end_learning_rate) == (5e-5, 1e-5)
        assert (recipe.optimizer.warmup_fraction, recipe.optimizer.weight_decay) == (0.01, 0.0)
        assert (recipe.model.ar.hidden_size, recipe.model.ar.intermediate_size) == (width, mlp)
        assert (
            recipe.model.tokenizer.encoder.param_dtype == recipe.model.vae.param_dtype == "bfloat16"
        )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("1.7B", r"size='1\.7B' is not one of 0\.6b, .*; did you mean 1\.7b\?"),
        ("4b+4.8", r"diffusion head='4\.8' is not one of 0\.6b, 1\.6b, 4\.8b; did you mean 4\.8b"),
        ("4b+", "diffusion head='' is not one of"),
    ],
)
def test_an_unknown_size_names_the_nearest(argument, message):
    with pytest.raises(config.ConfigError, match=message):
        loader.load(f"{CONFIGS}/pretrain.py:{argument}")


# Billions of parameters without embeddings, as the model cards of Qwen3 round them.
@pytest.mark.parametrize(
    ("size", "billions"), [("0.6b", 0.44), ("1.7b", 1.4), ("4b", 3.6), ("8b", 6.95)]
)
def test_language_models_have_the_published_sizes(size, billions):
    ar = config.LANGUAGE_MODELS[size]
    width, heads = ar.hidden_size, ar.num_attention_heads * ar.head_dim
    keys = ar.num_key_value_heads * ar.head_dim
    attention = 2 * width * (heads + keys)
    layer = attention + 3 * width * ar.intermediate_size + 2 * width + 2 * ar.head_dim
    count = ar.num_hidden_layers * layer + width
    assert count / 1e9 == pytest.approx(billions, rel=0.012)
    assert ar.tie_word_embeddings == (size != "8b")


def test_a_size_names_both_networks():
    found = loader.load(f"{CONFIGS}/pretrain.py:8b+0.6b").model
    assert found.ar == dataclasses.replace(config.LANGUAGE_MODELS["8b"], remat="dots")
    assert found.dit == dataclasses.replace(config.DIFFUSION_HEADS["0.6b"], remat="dots")
    assert (found.dit.num_layers, found.dit.hidden_size) == (28, 1152)


NAN, INF = float("nan"), float("inf")
# Of every kind: not a number, beyond every bound, of another type, empty, hostile text, wrong
# depth.
ODD = (
    *(NAN, INF, -INF, -1, -1.5, 0, 0.0, 1e-300, 1e300, 10**9, 10**30, 10**5000, True, None, 1j),
    *("", "x", "nan", "\0", "a\0b", "\ud800", "(", "../..", b"", b"x"),
    *(
        (),
        [],
        {},
        set(),
        object,
        (NAN,),
        (-1,),
        ("",),
        (None,),
        ((),),
        ((-1, 0),),
        ("(",),
        ({},),
        ({"a": 1},),
        [[["x"]]],
    ),
)


def leaves(cls=config.Config, path=""):
    """Return (dotted path of the group, group, field, annotation) of every field that is no group,
    those of lists of groups too.
    """
    for name, hint in fields.field_types(cls).items():
        kind, _, _ = fields.unwrapped(hint)
        inner = (
            fields.unwrapped(typing.get_args(kind)[0])[0]
            if typing.get_origin(kind) is tuple
            else None
        )
        if isinstance(kind, type) and issubclass(kind, fields.PartConfig):
            for family in kind.families.values():
                yield from leaves(family, fields.join(path, name))
        elif fields.is_group(kind):
            yield from leaves(kind, fields.join(path, name))
        else:
            yield path, cls, name, hint
        if fields.is_group(inner):
            yield from leaves(inner, f"{fields.join(path, name)}[0]")


LEAVES = tuple(leaves())


def nested(path, value, cls):
    """Return {"a": [{"b": value}]} of "a[0].b", a field of `cls`; with its `model_type` for a
    family."""
    for part in reversed(path.split(".")):
        name, bracket, _ = part.partition("[")
        value = {name: [value] if bracket else value}
        if part == path.rpartition(".")[2] and getattr(cls, "model_type", ""):
            value["model_type"] = cls.model_type
    return value


def at(value, path):
    for part in path.split("."):
        name, bracket, _ = part.partition("[")
        value = getattr(value, name)
        value = value[0] if bracket else value
    return value


def bare(hint):
    """Return kinds in an annotation that say nothing of what is allowed."""
    kind, constraints, _ = fields.unwrapped(hint)
    if kind in (int, float, str):
        return [] if constraints else [kind]
    return [
        found
        for inner in typing.get_args(kind)
        if inner is not ... and typing.get_origin(kind) is tuple
        for found in bare(inner)
    ]


def in_python(given):
    cls, name, value = given
    return cls(**{name: value})


def assert_sane(value):
    """Check what no setting may be, whatever its annotation says."""
    if isinstance(value, tuple):
        for inner in value:
            assert_sane(inner)
    elif isinstance(value, float):
        assert math.isfinite(value) and abs(value) <= 1e12
    elif isinstance(value, int):
        assert abs(value) < 2**32
    elif isinstance(value, str):
        assert "\0" not in value
    else:
        assert value is None or dataclasses.is_dataclass(value)


def test_every_field_says_what_it_may_hold():
    assert len(LEAVES) > 180
    unbounded = [fields.join(path, name) for path, _, name, hint in LEAVES if bare(hint)]
    assert not unbounded, "give these a type with bounds (fields.py): " + ", ".join(unbounded)


@pytest.mark.parametrize("place", sorted({path for path, *_ in LEAVES}))
def test_an_odd_value_of_any_field_is_refused_by_name_or_is_within_bounds(place):
    """Set it from a dictionary, as the command line and a checkpoint give it, and in Python, as a
    config file does.
    """
    for path, cls, name, hint in LEAVES:
        if path != place:
            continue
        where, refused = fields.join(path, name), 0
        for value in ODD:
            for construct, given in (
                (config.from_dict, nested(where, value, cls)),
                (in_python, (cls, name, value)),
            ):
                try:
                    got = construct(given)
                except config.ConfigError as error:
                    assert (
                        name in str(error) and "\n" not in str(error) and len(str(error)) < 400
                    ), str(error)
                    refused += 1
                else:
                    got = (
                        at(got, where)
                        if isinstance(got, config.Config) and cls is not config.Config
                        else getattr(got, name)
                    )
                    assert_sane(got)
                    fields.convert(got, hint, where)
        assert refused >= len(ODD), f"{where} takes nearly everything"


def test_an_annotation_is_walked_once(monkeypatch):
    """Construct groups many times."""
    config.Config()
    monkeypatch.setattr(fields.typing, "get_type_hints", None)
    monkeypatch.setattr(fields.typing, "get_origin", None)
    assert config.from_dict(config.to_dict(UNUSUAL)) == UNUSUAL


def test_a_value_given_in_python_is_named_in_full():
    assert {
        cls: path
        for path, cls, *_ in LEAVES
        if cls.group_path not in (path.removesuffix("[0]"), path.split(".")[-1])
    } == {config.SamplingConfig: "rl.rollout"}
    with pytest.raises(
        config.ConfigError, match=r"^optimizer\.learning_rate=nan must lie between 0 and 100$"
    ):
        config.OptimizerConfig(learning_rate=NAN)
    with pytest.raises(
        config.ConfigError,
        match=r"^rl\.rollout\.top_p=0\.0 must lie between 0 \(excluded\) and 1; 1 switches it off$",
    ):
        config.from_dict({"rl": {"rollout": {"top_p": 0}}})


def test_names_of_strategies_and_parts_are_those_that_there_are():
    assert set(typing.get_args(config.StrategyName)) == {"auto", *rules.STRATEGIES}
    assert set(typing.get_args(config.Part)) == set(blip3o.MODEL_PARTS)


def test_the_edges_of_sampling_settings_are_accepted():
    config.SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, steps=1, guidance=0.0, batch_size=1)


@pytest.mark.parametrize(
    ("message", "line"), [("", "ValueError"), ("\n x\ny", "x"), (" \n", "ValueError")]
)
def test_the_first_line_of_any_exception(message, line):
    assert errors.first_line(ValueError(message)) == line


def test_an_exception_by_name_and_first_line():
    assert errors.type_and_line(KeyError("a")) == "KeyError: 'a'"
    assert errors.type_and_line(ValueError("a\nb")) == "ValueError: a"
    assert errors.type_and_line(ValueError()) == "ValueError"


def test_a_model_type_names_the_family_of_a_part():
    """Convert it to JSON, there and back, and on the command line, before all other fields wherever
    it stands; what was set of the old family stays where the new one has it.
    """
    cfg = config.ModelConfig(ar=config.Qwen2Config(hidden_size=768), dit=config.MMDiTConfig())
    values = config.to_dict(cfg)
    assert (values["ar"]["model_type"], values["vae"]["model_type"]) == ("qwen2", "dc_ae")
    assert config.from_dict(values, config.ModelConfig) == cfg
    assert config.from_dict({"ar": {}}, config.ModelConfig).ar == config.Qwen3Config()
    assert config.from_dict({"model": config.to_dict(cfg)}).model == cfg
    given = [("model.ar.num_hidden_layers", "3"), ("model.ar.model_type", "qwen2")]
    found = loader.load(f"{CONFIGS}/pretrain.py:1.7b", given).model.ar
    assert found == config.Qwen2Config(num_hidden_layers=3, remat="dots")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "qwen"}, r"model.ar.model_type='qwen' is not one of qwen3, qwen2; did you"),
        ({"model_type": 3}, r"model.ar.model_type=3 is not one of qwen3, qwen2"),
        (
            {"model_type": "qwen2", "head_dim": 64},
            r"unknown config key model.ar.head_dim: .*model.ar takes",
        ),
    ],
)
def test_a_wrong_model_type_or_a_field_of_another_family_is_refused(values, message):
    with pytest.raises(config.ConfigError, match=message):
        config.from_dict({"model": {"ar": values}})
