"""The recipe for one's own pictures follows from the pictures and the devices."""

import dataclasses
import re

import pytest

from blip3o_jax.config import UserError
from blip3o_jax.data.held_out import is_held_out
from blip3o_jax.demo import own
from blip3o_jax.demo import recipe as demo
from blip3o_jax.parallel.machine import Machine
from tests import tiny
from tests.docs import pages

TWO_CORES = Machine("cpu", "cpu", 1, 2)
TPU = Machine("tpu", "TPU v5 lite", 1, 24)
CAPTIONS = tuple(
    f"a picture of thing {i} in a {'red' if i % 3 else 'green'} box" for i in range(900)
)


@pytest.mark.parametrize(
    ("records", "low", "high"), [(200, 24, 24), (900, 27, 27), (30000, 256, 256)]
)
def test_a_bounded_number_of_records_is_held_out(records, low, high):
    captions = [f"number {i}" for i in range(records)]
    fraction = own.held_out_fraction(captions, records)
    assert low <= sum(is_held_out(caption, fraction) for caption in captions) <= high


def test_a_part_of_a_large_set_gives_the_fraction_of_the_whole():
    captions = [f"number {i}" for i in range(40_000)]
    fraction = own.held_out_fraction(captions[::4], 40_000)
    assert 200 <= sum(is_held_out(caption, fraction) for caption in captions) <= 320


def test_equal_captions_are_held_out_together():
    captions = [f"number {i // 5}" for i in range(1000)]
    fraction = own.held_out_fraction(captions, 1000)
    assert 30 <= sum(is_held_out(caption, fraction) for caption in captions) < 35


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        (["a cat"] * 900, "describe what differs"),
        (["a cat", "a dog", "a cow"] * 300, "describe what differs"),
        (CAPTIONS[: own.MIN_RECORDS - 1], "overfit.py"),
    ],
)
def test_what_cannot_be_divided_is_an_error_that_says_why(captions, words):
    with pytest.raises(UserError, match=words):
        own.held_out_fraction(captions, len(captions))


@pytest.mark.parametrize(
    ("sides", "largest", "side"),
    [
        ((64,), 64, 64),
        ((20, 500, 90), 64, 64),
        ((500,), 128, 128),
        ((50,), 128, 48),
        ((9,), 64, 32),
    ],
)
def test_the_side_is_one_that_half_of_the_pictures_have(sides, largest, side):
    assert own.image_side(sides, largest) == side


def test_rows_hold_nearly_all_captions_and_no_more_than_the_limit():
    model = demo.model(64, sizes=demo.Sizes(text_pieces=own.text_pieces(CAPTIONS)))
    alone, row = own.row_lengths(CAPTIONS, CAPTIONS, model, 256)
    assert alone % 8 == row % 8 == 0 and row > alone + model.tokenizer.num_tokens
    long = (*CAPTIONS, " ".join(CAPTIONS[:40]))  # one of 901 does not stretch the rows
    assert own.row_lengths(long, CAPTIONS, model, 256) == (alone, row)
    assert own.row_lengths([long[-1]] * 9, CAPTIONS, model, 128) == (128, 128)


def test_a_script_of_many_letters_has_a_vocabulary():
    captions = [
        "".join(chr(0x4E00 + (i * 37 + k * 91) % 3000) for k in range(9)) for i in range(300)
    ]
    model = demo.model(64, sizes=demo.Sizes(text_pieces=own.text_pieces(captions)))
    assert own.row_lengths(captions, captions, model, 256)[0] >= 16  # a piece for most letters


def test_the_page_has_the_number_of_pictures():
    page = (pages.ROOT / "docs/how_to/own_images.md").read_text("utf-8")
    assert f"| {own.MIN_RECORDS} to" in page and f"## {own.MIN_RECORDS} pictures or more" in page


def test_records_left_out_are_reported(tmp_path, capsys):
    folder = tiny.write_data(tmp_path / "images", CAPTIONS[:240])
    lines = (folder / "captions.jsonl").read_text().splitlines()
    (folder / "captions.jsonl").write_text("\n".join([*lines[:210], *["[]"] * 5]))
    message = r"5 records cannot be read \(first .*line 211: the JSON is not an object\)"
    own.recipe(str(folder), TWO_CORES)
    assert re.search(message, capsys.readouterr().err)
    (folder / "captions.jsonl").write_text("\n".join([*lines[:9], *["[]"] * 5]))
    message = message.replace("211", "10")
    with pytest.raises(UserError, match=f"{folder}: 9 captioned pictures are too few.*{message}"):
        own.recipe(str(folder), TWO_CORES)


def test_linked_pictures_have_advice_that_the_recipe_can_follow(tmp_path):
    """Check that the pictures are read before data.images of the command line is."""
    folder = tiny.write_data(tmp_path / "images", CAPTIONS[:3])
    for path in folder.glob("*.png"):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    with pytest.raises(UserError, match=r"leads out of the data set, to .*png: put the") as caught:
        own.recipe(str(folder), TWO_CORES)
    assert "data.images" not in str(caught.value)


def test_steps_follow_time_data_and_devices():
    lengths = {"contrastive": 24, "joint": 64}
    seconds = own.seconds_per_example(TWO_CORES, 64, 64, demo.Sizes())
    measured = own.seconds_per_example(TWO_CORES, own.MEASURED_SIDE, own.MEASURED_ROW, demo.Sizes())
    assert measured == {name: 1 / rate for name, rate in own.EXAMPLES_PER_S.items()}
    many = own.stage_extents(100_000, seconds, lengths)
    for name, extent in many.items():  # all of the budget is spent
        spent = extent.steps * extent.batch_size * seconds[name]
        assert spent == pytest.approx(own.BUDGET * own.SHARES[name], rel=0.02)
    assert sum(own.SHARES.values()) == pytest.approx(1)
    few = own.stage_extents(300, seconds, lengths)
    assert few["joint"].steps * 64 <= own.EPOCHS["joint"] * 300
    assert (few["contrastive"].max_length, few["joint"].max_length) == (24, 64)
    four = own.seconds_per_example(dataclasses.replace(TWO_CORES, cores=4), 64, 64, demo.Sizes())
    larger = own.seconds_per_example(TWO_CORES, 128, 64, demo.Sizes())
    longer = own.seconds_per_example(TWO_CORES, 64, 128, demo.Sizes())
    assert four["joint"] == seconds["joint"] / 2 and longer["joint"] > seconds["joint"]
    assert larger["autoencoder"] == 4 * seconds["autoencoder"]
    assert own.seconds_per_example(TPU, 64, 64, demo.Sizes())["joint"] < seconds["joint"] / 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("own") / "images", CAPTIONS[:240])


def test_the_recipe_is_whole_without_a_setting(folder, capsys):
    stages = own.recipe(str(folder), TWO_CORES)
    assert list(stages) == ["autoencoder", "contrastive", "tokenizer", "joint"]
    assert len({stage.data.held_out for stage in stages.values()}) == 1
    assert stages["joint"].data.held_out > 0 and stages["joint"].eval_every > 0
    assert stages["joint"].model.image_size == 32 and stages["joint"].data.path == str(folder)
    assert f"{folder}: 240 records" in capsys.readouterr().err
    assert own.recipe(str(folder), TWO_CORES) == stages  # so that the same command resumes
    chip = own.recipe(str(folder), TPU)["joint"].model
    assert (
        chip.ar.hidden_size > stages["joint"].model.ar.hidden_size and chip.ar.dtype == "bfloat16"
    )
