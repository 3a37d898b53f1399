import textwrap

import pytest

from blip3o_jax import config
from blip3o_jax.config import loader

SMALL = """
    from blip3o_jax.config import Config, DataConfig, OptimizerConfig

    def get_config():
        optimizer = OptimizerConfig(learning_rate=1e-3)
        return Config(steps=7, optimizer=optimizer, data=DataConfig(path="a.tar"))
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text: str, name: str = "x.py") -> str:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write_file


def test_without_overrides_the_files_own_config(write):
    want = config.Config(
        steps=7,
        optimizer=config.OptimizerConfig(learning_rate=1e-3),
        data=config.DataConfig(path="a.tar"),
    )
    assert loader.load(write(SMALL)) == want


def test_the_argument_may_end_as_a_config_file_does(write):
    path = write("""
        from blip3o_jax.config import Config, DataConfig

        def get_config(path):
            return Config(data=DataConfig(path=path))
    """)
    assert loader.load(f"{path}:photos.py").data.path == "photos.py"
    assert loader.load(f"{path}:a.py:b.py").data.path == "a.py:b.py"


def test_overrides_take_the_type_of_their_field(write):
    got = loader.load(
        write(SMALL),
        {
            "steps": "12",
            "optimizer.learning_rate": "1",
            "data.path": "12",
            "data.shuffle": "false",
            "model.dit.qk_norm": "none",
            "model.vae.encoder_block_out_channels": "(128, 256, 512, 512, 1024, 2048)",
            "model.vae.decoder_qkv_multiscales": "[(), (), (), [5], [3], [5]]",
            "trainable": "('ar/.*',)",
            "checkpoint.init_from": "[('ar', 'runs/ar')]",
            "data.sources": "[{'path': 'b.tar', 'weight': 2}]",
        },
    )
    assert (
        got.steps == 12
        and got.optimizer.learning_rate == 1.0
        and isinstance(got.optimizer.learning_rate, float)
    )
    assert got.data.path == "12" and got.data.shuffle is False and got.model.dit.qk_norm is None
    assert got.model.vae.encoder_block_out_channels == (128, 256, 512, 512, 1024, 2048)
    assert got.model.vae.decoder_qkv_multiscales == ((), (), (), (5,), (3,), (5,))
    assert got.trainable == ("ar/.*",) and got.checkpoint.init_from == (("ar", "runs/ar"),)
    assert got.data.sources == (config.SourceConfig(path="b.tar", weight=2.0),)


def test_a_field_that_is_none_takes_text(write):
    first = loader.load(
        write(SMALL),
        [("model.dit.qk_norm", "none"), ("model.dit.qk_norm", "rms_norm_across_heads")],
    )
    assert first.model.dit.qk_norm == "rms_norm_across_heads"


def test_overrides_that_only_work_together_are_checked_together(write):
    got = loader.load(write(SMALL), {"data.batch_size": "6", "optimizer.accumulate": "3"})
    assert (got.data.batch_size, got.optimizer.accumulate) == (6, 3)


def test_the_argument_reaches_get_config(write):
    path = write("""
        from blip3o_jax.config import Config

        def get_config(steps="3"):
            return Config(steps=int(steps))
    """)
    assert loader.load(path).steps == 3
    assert loader.load(path + ":5").steps == 5


def test_a_recipe_is_overridden_as_a_whole_or_by_name(write):
    path = write("""
        from blip3o_jax.config import Config

        def get_config():
            return {"autoencoder": Config(stage="autoencoder", steps=5), "joint": Config(steps=6)}
    """)
    got = loader.load_recipe(path, {"seed": "3", "joint.steps": "9"})
    assert [(name, c.stage, c.seed, c.steps) for name, c in got.items()] == [
        ("autoencoder", "autoencoder", 3, 5),
        ("joint", "joint", 3, 9),
    ]
    assert loader.load(path) == config.Config(steps=6)
    with pytest.raises(config.UserError, match=r"unknown config key stepps: did you mean steps\?"):
        loader.load_recipe(path, {"joint.stepps": "9"})
    with pytest.raises(config.UserError, match=r"stage of the recipe; .*--config\.joint\.steps="):
        loader.load_recipe(path, {"joint": "9"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimiser.learning_rate": "1"}, "unknown config key optimiser: did you mean optimizer?"),
        (
            {"optimizer.learning_rat": "1"},
            "unknown config key optimizer.learning_rat: did you mean optimizer.learning_rate?",
        ),
        ({"steps": "many"}, "steps='many' must be of type int"),
        ({"steps": "1.5"}, "steps='1.5' must be of type int"),
        ({"data.shuffle": "maybe"}, "data.shuffle='maybe' must be true or false"),
        ({"trainable": "ar/.*"}, "trainable='ar/.*' must be a list such as \"('a', 'b')\""),
        (
            {"model.vae.encoder_layers_per_block": "3"},
            "model.vae.encoder_layers_per_block=3 must be a list",
        ),
        (
            {"model.vae.encoder_layers_per_block": "(1, 'a')"},
            "model.vae.encoder_layers_per_block[1]='a' must be of type int",
        ),
        (
            {"data.sources": "[{'paht': 'b'}]"},
            "unknown config key data.sources[0].paht: did you mean data.sources[0].path?",
        ),
        ({"data": "x"}, "config key data is a group; set one of its fields: path, format"),
        ({"steps.x": "1"}, "config key steps.x: steps is a single value"),
        ({"": "3"}, "--config.='3' names no field: write --config.GROUP.FIELD=VALUE"),
        ({"optimizer..b1": "1"}, "--config.optimizer..b1='1' names no field: write"),
        ({"steps": "-1"}, "steps=-1 must lie between 1 and"),
        ({"steps": "9" * 5000}, "steps='9999"),
        ({"seed": "4294967296"}, "seed=4294967296 must lie between 0 and 4,294,967,295"),
        (
            {"optimizer.learning_rate": "nan"},
            "optimizer.learning_rate=nan must lie between 0 and 100",
        ),
        (
            {"rl.rollout.top_p": "0"},
            "rl.rollout.top_p=0.0 must lie between 0 (excluded) and 1; 1 switches it off",
        ),
        ({"data.path": "a\0b"}, "data.path='a\\x00b' must be a path: it contains a NUL character"),
        (
            {"trainable": "('(',)"},
            "trainable[0]='(' must be a regular expression: missing ), unterminated subpattern",
        ),
        ({"trainable": "(" * 5000}, "trainable='((((("),
        (
            {"data.sources": "[{1: 2}]"},
            "unknown config key data.sources[0].1: data.sources[0] takes path, format",
        ),
        (
            {"model.ar.dtype": "int8"},
            "model.ar.dtype='int8' is not one of float32, bfloat16, float16",
        ),
        ({"mesh.data": "-2"}, "mesh.data=-2 must lie between -1 and 1,048,576; -1 takes"),
        ({"mesh.data": "-1", "mesh.fsdp": "-1"}, "mesh sizes data=-1, fsdp=-1"),
    ],
)
def test_a_bad_override_is_one_line_that_names_the_field(write, overrides, message):
    with pytest.raises(config.UserError) as error:
        loader.load(write(SMALL), overrides)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "x.py:1: SyntaxError"),
        (
            "import blip3o_jax.absent\n",
            "x.py:1: ModuleNotFoundError: No module named 'blip3o_jax.absent'",
        ),
        (
            "def get_config():\n    return undefined\n",
            "x.py:2: NameError: name 'undefined' is not defined",
        ),
        ("CONFIG = 3\n", "x.py defines no function get_config()"),
        (
            "def get_config():\n    return {}\n",
            "x.py: get_config() must return a blip3o_jax.config.Config or an "
            "ml_collections.ConfigDict, not dict",
        ),
        ("def get_config(size):\n    return size\n", "needs an argument, its 'size'"),
        (
            "get_config = min\n",
            "x.py: get_config is no function of the file: write def get_config(): ...",
        ),
        ("raise GeneratorExit\n", "x.py:1: GeneratorExit"),
        ("\nclass Own(BaseException): ...\nraise Own('x')\n", "x.py:3: Own: x"),
        ("a = '\0'\n", "x.py: SyntaxError: source code string cannot contain null bytes"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(write, text, message):
    path = write(text)
    with pytest.raises(config.UserError) as error:
        loader.load(path)
    assert message in str(error.value) and path in str(error.value)
    assert "\n" not in str(error.value)


CONFIG_DICT = """
    from ml_collections import ConfigDict

    def get_config(**changes):
        config = ConfigDict({"steps": 7, "optimizer": {"learning_rate": 1}})
        config.data = ConfigDict({"sources": [{"path": "a.tar"}], "batch_size": 6})
        config.model = {"tokenizer": {"encoder": {"image_size": 128}}}
        CHANGE
        return config
"""


def test_a_config_dict_is_taken_as_a_config_is(write):
    path = write(CONFIG_DICT.replace("CHANGE", ""))
    want = config.Config(
        steps=7,
        optimizer=config.OptimizerConfig(learning_rate=1.0, accumulate=4),
        data=config.DataConfig(sources=(config.SourceConfig(path="a.tar"),), batch_size=8),
        model=config.ModelConfig(
            tokenizer=config.TaTokConfig(encoder=config.SiglipVisionConfig(image_size=128))
        ),
    )
    # Neither alone goes with the rest.
    got = loader.load(path, {"optimizer.accumulate": "4", "data.batch_size": "8"})
    assert got == want and isinstance(got.optimizer.learning_rate, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("config.stepps = 1", "x.py: unknown config key stepps: did you mean steps?"),
        (
            "config.optimizer.lerning_rate = 1",
            "x.py: unknown config key optimizer.lerning_rate: "
            "did you mean optimizer.learning_rate?",
        ),
        ("config.steps = 0", "x.py: steps=0 must lie between 1 and"),
        ("config.optimizer.clip_norm = 'x'", "x.py: optimizer.clip_norm='x' must be of type float"),
        ("config.mesh = 3", "x.py: mesh must be a group of fields, not 3"),
        (
            "import ml_collections; "
            "config.seed = ml_collections.config_dict.required_placeholder(int)",
            "x.py: RequiredValueError",
        ),
        ("return {'a': config, 'b': 3}", "must return a blip3o_jax.config.Config or an"),
    ],
)
def test_a_bad_config_dict_is_refused_as_a_config_is(write, change, message):
    with pytest.raises(config.UserError) as error:
        loader.load(write(CONFIG_DICT.replace("CHANGE", change)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_of_config_dicts_and_configs(write):
    change = "from blip3o_jax.config import Config; return {'a': config, 'b': Config(steps=2)}"
    got = loader.load_recipe(write(CONFIG_DICT.replace("CHANGE", change)), {"b.steps": "3"})
    assert [(name, c.steps) for name, c in got.items()] == [("a", 7), ("b", 3)]


def test_the_package_has_the_configs_that_the_working_directory_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loader.load("configs/instruct.py").steps == 7000
    with pytest.raises(
        config.UserError, match=r"configs/pretran.py does not .* configs/pretrain.py"
    ):
        loader.load("configs/pretran.py")
    with pytest.raises(config.UserError, match=r"other/pretrain.py does not exist$"):
        loader.load("other/pretrain.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/pretrain.py").write_text(textwrap.dedent(SMALL))
    assert loader.load("configs/pretrain.py").steps == 7


def test_a_function_of_any_arguments(write):
    path = write(
        "from blip3o_jax.config import Config\n"
        "def get_config(*a, **k):\n"
        "    return Config(steps=int(*a or '3'))"
    )
    assert [loader.load(path).steps, loader.load(path + ":5").steps] == [3, 5]


def test_a_directory_is_no_config_file(tmp_path):
    (tmp_path / "x.py").mkdir()
    with pytest.raises(config.UserError, match=r"x.py is no regular file: name a Python file$"):
        loader.load(str(tmp_path / "x.py"))


def test_an_argument_where_none_is_taken(write):
    with pytest.raises(config.UserError, match=r"takes no argument: use --config=.* without :big"):
        loader.load(write(SMALL) + ":big")


def test_a_missing_file_names_the_nearest(write):
    path = write(SMALL, "pretrain.py")
    with pytest.raises(
        config.UserError, match=r"pretran.py does not exist; did you mean .*pretrain.py\?"
    ):
        loader.load(path.replace("pretrain", "pretran"))
    with pytest.raises(config.UserError, match="must name a Python file"):
        loader.load("pretrain")
