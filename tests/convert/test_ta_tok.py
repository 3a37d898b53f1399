"""The args of a TA-Tok file and the file of --ta_tok_config: what each sets, what is refused, and
the way back.
"""

import copy
import dataclasses
import json

import pytest

from blip3o_jax.config import TaTokConfig, UserError
from blip3o_jax.convert.ta_tok import args_of, overrides_of, read_ta_tok
from blip3o_jax.demo import recipe
from tests import tiny

PUBLISHED = TaTokConfig()
# As published with the weights, arguments of training included.
ARGS = {
    "bottleneck": {
        "name": "bottleneck",
        "args": {
            "bottleneck_dim": 1536,
            "norm": "none",
            "regularizer": {
                "name": "simvq",
                "args": {
                    "codebook_size": 65536,
                    "commitment_loss_weight": 0.25,
                    "codebook_loss_weight": 1.0,
                    "entropy_loss_weight": 0.0,
                    "entropy_loss_temperature": 0.01,
                    "l2_normalized": True,
                    "stochastic": True,
                    "stochastic_temperature": 0.03,
                },
            },
        },
    },
    "bottleneck_token_num": 729,
    "input_size": 384,
    "teacher": "google/siglip2-so400m-patch14-384",
    "input_type": "rec",
    "pool_scale": 1,
    "rand_scale": True,
    "decoder_depth": 3,
    "select_layer_id": -2,
}
REGULARIZER = "bottleneck.args.regularizer"


def with_arg(path, value):
    """Return ARGS with the value at a path another."""
    args = copy.deepcopy(ARGS)
    *above, name = path.split(".")
    place = args
    for key in above:
        place = place[key]
    place[name] = value
    return args


def read_with(tmp_path, args, override):
    file = tmp_path / "ta_tok.json"
    file.write_text(json.dumps(override))
    return read_ta_tok(PUBLISHED, args, file)


def refused(read, *args):
    with pytest.raises(UserError) as error:
        read(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_published_args_are_the_published_tokenizer():
    assert read_ta_tok(PUBLISHED, ARGS, None) == dataclasses.replace(PUBLISHED, stochastic=True)
    assert read_ta_tok(PUBLISHED, {}, None) == PUBLISHED


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("bottleneck.args.bottleneck_dim", 8, "bottleneck_dim"),
        (f"{REGULARIZER}.args.codebook_size", 32, "codebook_size"),
        (f"{REGULARIZER}.args.l2_normalized", False, "l2_normalized"),
        (f"{REGULARIZER}.args.stochastic", False, "stochastic"),
        (f"{REGULARIZER}.args.stochastic_temperature", 0.5, "stochastic_temperature"),
        ("pool_scale", 3, "pool_scale"),
        ("select_layer_id", -28, "select_layer"),
        ("decoder_depth", 5, "decoder.num_hidden_layers"),
    ],
)
def test_an_arg_sets_its_field(path, value, field):
    want = dataclasses.replace(PUBLISHED, stochastic=True)
    if field.startswith("decoder."):
        want = dataclasses.replace(
            want, decoder=dataclasses.replace(want.decoder, num_hidden_layers=value)
        )
    else:
        want = dataclasses.replace(want, **{field: value})
    assert want != read_ta_tok(PUBLISHED, ARGS, None)
    assert read_ta_tok(PUBLISHED, with_arg(path, value), None) == want


def test_the_size_of_the_images():
    cfg = read_ta_tok(PUBLISHED, with_arg("input_size", 256) | {"bottleneck_token_num": 324}, None)
    assert (cfg.encoder.image_size, cfg.encoder.grid) == (256, 18)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "bottleneck.name",
            "mlp",
            "bottleneck.name='mlp' is not supported: it must be 'bottleneck'",
        ),
        (
            "bottleneck.args.norm",
            "batch",
            "bottleneck.args.norm='batch' is not supported: it must be 'none'",
        ),
        (
            f"{REGULARIZER}.name",
            "fsq",
            "regularizer.name='fsq' is not supported: it must be 'simvq'",
        ),
        (
            "bottleneck.args.groups",
            2,
            "bottleneck.args.groups=2 is unknown and may change",
        ),
        (
            f"{REGULARIZER}.args.rotation_trick",
            True,
            "regularizer.args.rotation_trick=True is unknown",
        ),
        ("patch_norm", "layer", "patch_norm='layer' is unknown"),
        ("bottleneck", None, "bottleneck=None is unknown"),
        ("input_size", "384", "must be of type int"),
        ("input_size", 0, "encoder.image_size=0 must lie between 1 and"),
        ("bottleneck.args.bottleneck_dim", -8, "bottleneck_dim=-8 must lie between 1 and"),
        ("decoder_depth", 0, "decoder.num_hidden_layers=0 must lie between 1 and"),
        ("pool_scale", 4, "pool_scale=4 must lie between 1 and 3"),
        ("select_layer_id", -29, "select_layer=-29 must be -28 or more"),
        (
            "select_layer_id",
            3,
            "select_layer=3 must lie between -1,025 and -1; it counts from the end",
        ),
    ],
)
def test_args_that_are_refused(path, value, message):
    line = refused(read_ta_tok, PUBLISHED, with_arg(path, value), None)
    assert message in line and ("TA-Tok args" in line or "tokenizer." in line), line


def test_the_file_goes_over_the_args(tmp_path):
    override = {
        "bottleneck_dim": 12,
        "select_layer": -5,
        "encoder": {"patch_size": 16, "num_hidden_layers": 4},
    }
    args = with_arg("bottleneck.args.bottleneck_dim", 8) | {
        "select_layer_id": -2,
        "bottleneck_token_num": 576,
    }
    cfg = read_with(tmp_path, args, override)
    assert (cfg.bottleneck_dim, cfg.select_layer) == (12, -5)
    assert (cfg.encoder.patch_size, cfg.encoder.num_hidden_layers, cfg.encoder.hidden_size) == (
        16,
        4,
        1152,
    )
    assert cfg.stochastic and cfg.encoder.grid == 24


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"encoders": {}}, "key='encoders' is not one of encoder, decoder, bottleneck_dim"),
        ({"stochastic": True}, "key='stochastic' is not one of"),
        ({"encoder": {"hiden_size": 8}}, "hiden_size"),
        ({"encoder": {"stem": {"size": 8}}}, "stem is not a group of fields"),
        ({"bottleneck_dim": {"size": 8}}, "bottleneck_dim is not a group of fields"),
        ({"encoder": 8}, "encoder"),
        ({"bottleneck_dim": "8"}, "bottleneck_dim='8' must be of type int"),
        (
            {"encoder": {"num_hidden_layers": 3}, "select_layer": -5},
            "select_layer=-5 must be -4 or more",
        ),
        ({"encoder": {"patch_size": 0}}, "encoder.patch_size=0 must lie between 1 and"),
        (
            {"encoder": {"num_attention_heads": 0}},
            "encoder.num_attention_heads=0 must lie between 1 and",
        ),
        ({"decoder": {"num_patches": 0}}, "decoder.num_patches=0 must lie between 1 and"),
    ],
)
def test_a_file_that_is_refused(tmp_path, override, message):
    line = refused(read_with, tmp_path, {}, override)
    assert message in line and str(tmp_path / "ta_tok.json") in line, line


CONFIGS = {
    "tiny": tiny.model().tokenizer,
    "demo": recipe.model().tokenizer,
    "other": dataclasses.replace(
        tiny.model().tokenizer,
        pool_scale=2,
        stochastic=True,
        stochastic_temperature=0.5,
        l2_normalized=False,
        select_layer=-3,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(tmp_path, name):
    """Check that args and file as an export writes them state the tokenizer whole, patches of
    another size included.
    """
    cfg = CONFIGS[name]
    computed_in = dataclasses.replace(PUBLISHED, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
    file = tmp_path / "ta_tok_config.json"
    file.write_text(json.dumps(overrides_of(cfg)))
    assert read_ta_tok(computed_in, json.loads(json.dumps(args_of(cfg))), file) == cfg


def test_the_args_alone_state_what_they_can():
    cfg = dataclasses.replace(
        PUBLISHED,
        pool_scale=3,
        codebook_size=64,
        stochastic=True,
        l2_normalized=False,
        select_layer=-7,
    )
    assert read_ta_tok(PUBLISHED, args_of(cfg), None) == cfg
