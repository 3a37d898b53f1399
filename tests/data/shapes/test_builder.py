import json
import pathlib
import sys

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from blip3o_jax.config import UserError
from blip3o_jax.data.shapes import builder, captions, draw, scene

SIZES = {"num_train": 60, "num_validation": 5, "num_test": 14}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return builder.prepare(tmp_path_factory.mktemp("data"), **SIZES, image_size=64, seed=1)


def test_every_split_holds_its_scenes(directory: pathlib.Path) -> None:
    reader = tfds.builder_from_directory(str(directory))
    for split, size in zip(scene.SPLITS, SIZES.values(), strict=True):
        source = reader.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        found = {
            record["key"].decode(): record for record in (source[i] for i in range(len(source)))
        }
        assert len(found) == size
        for index in range(size):
            drawn = scene.sample(1, index, split)
            caption, metadata = captions.describe(drawn)
            record = found[drawn.key]
            assert record["caption"].decode() == caption
            assert record["category"].decode() == drawn.category
            assert json.loads(record["metadata"]) == metadata
            image = cv2.imdecode(np.frombuffer(record["image"], np.uint8), cv2.IMREAD_COLOR)[
                ..., ::-1
            ]
            np.testing.assert_array_equal(image, draw.render(drawn, 64))
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(("split", "size"), [("train", 60), ("test", 14)])
def test_prompts_are_next_to_the_data(directory: pathlib.Path, split: str, size: int) -> None:
    lines = (directory / f"prompts_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == captions.prompts(split, size, seed=1)


def test_prompts_are_added_to_a_data_set_without_them(directory: pathlib.Path) -> None:
    path = directory / "prompts_train.jsonl"
    before = path.read_text(encoding="utf-8")
    path.unlink()
    builder.prepare(directory.parents[2], **SIZES, image_size=64, seed=1)
    assert path.read_text(encoding="utf-8") == before


def test_same_arguments_reuse_and_others_do_not(
    directory: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = directory.parents[2]
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert builder.prepare(out, **SIZES, image_size=64, seed=1) == directory
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert capsys.readouterr().err == f"shapes: 79 scenes are in {directory} already\n"
    assert builder.prepare(out, **SIZES, image_size=64, seed=2) != directory
    assert "scenes/s" in capsys.readouterr().err


def test_bad_sizes_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="num_test=0 must be positive"):
        builder.prepare(tmp_path, num_train=1, num_validation=1, num_test=0)
    with pytest.raises(UserError, match="image_size=16 must be 32 or more"):
        builder.prepare(tmp_path, image_size=16)
