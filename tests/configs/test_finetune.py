"""configs/finetune.py takes a checkpoint as it is, and all its parts."""

import dataclasses
import pathlib

import pytest

from blip3o_jax.config import UserError, loader
from blip3o_jax.convert.importer import import_weights
from blip3o_jax.convert.source import open_source
from blip3o_jax.convert.tables import PUBLISHED_PARTS
from blip3o_jax.train import checkpoint
from tests.convert import published
from tests.convert.published import Options, planned_once  # noqa: F401

pytestmark = pytest.mark.usefixtures("planned_once")

FILE = str(pathlib.Path(__file__).parents[2] / "configs/finetune.py")


@pytest.mark.parametrize(
    "extra", [(), ("feature_connector",), ("latent_connector", "feature_connector")], ids=len
)
def test_it_is_the_model_of_the_checkpoint_and_begins_at_all_its_parts(extra, tmp_path):
    made = published.write(tmp_path, Options(31, vae="f2", **dict.fromkeys(extra, True)))
    root = tmp_path / "imported"
    import_weights(open_source(made.directory, **made.arguments), root)
    given, found = checkpoint.read_config(root), loader.load(f"{FILE}:{root}")
    assert found.stage == "joint"
    assert (found.data.max_length, found.sampling) == (0, given.sampling)
    wide = lambda part: dataclasses.replace(part, param_dtype="float32")
    model = given.model
    assert {model.ar.param_dtype, model.tokenizer.param_dtype, model.vae.param_dtype} == {
        "bfloat16"
    }
    assert found.model == dataclasses.replace(
        model,
        ar=wide(model.ar),
        connector=wide(model.connector),
        dit=wide(model.dit),
        text=dataclasses.replace(model.text, path=str(root / "text"), train_size=0),
    )
    assert [part for part, _ in found.checkpoint.init_from] == [*PUBLISHED_PARTS, *extra]
    assert {checkpoint.find(path) for _, path in found.checkpoint.init_from} == {(root, 0)}


def test_a_field_is_replaced_as_in_any_other(tmp_path):
    made = published.write(tmp_path, Options(31, vae="f2"))
    import_weights(open_source(made.directory, **made.arguments), tmp_path / "imported")
    found = loader.load(
        f"{FILE}:{tmp_path / 'imported'}",
        {"data.path": "a.tar", "model.dit.param_dtype": "bfloat16"},
    )
    assert (found.data.path, found.model.dit.param_dtype, found.model.ar.param_dtype) == (
        "a.tar",
        "bfloat16",
        "float32",
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "nowhere does not exist"), ("photos", "photos is not a checkpoint")],
)
def test_what_is_no_checkpoint(tmp_path, name, words):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError) as error:
        loader.load(f"{FILE}:{tmp_path / name}")
    assert words in str(error.value) and "\n" not in str(error.value)
