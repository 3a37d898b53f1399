import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.config import UserError
from blip3o_jax.samples import labelled_grid, write_images


def solid(*colours):
    return np.stack([np.full((8, 8, 3), colour, np.uint8) for colour in colours])


def test_files(tmp_path):
    images_BHWC = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    prompts = ["a café", "two\nlines", 'a "quoted" sign']
    paths = write_images(images_BHWC, prompts, tmp_path / "deep" / "out")
    assert [p.name for p in paths] == ["00000.png", "00001.png", "00002.png"]
    for path, image_HWC in zip(paths, images_BHWC, strict=True):
        np.testing.assert_array_equal(np.array(Image.open(path)), image_HWC)
    lines = (tmp_path / "deep" / "out" / "prompts.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file_name": path.name, "prompt": prompt}
        for path, prompt in zip(paths, prompts, strict=True)
    ]
    assert (tmp_path / "deep" / "out" / "grid.png").exists()


def kept(out):
    return sorted(path.name for path in out.iterdir())


def test_fewer_images_take_the_place_of_more(tmp_path):
    write_images(solid((1, 1, 1), (2, 2, 2), (3, 3, 3)), ["a", "b", "c"], tmp_path / "out")
    write_images(solid((9, 9, 9)), ["d"], tmp_path / "out")
    assert kept(tmp_path / "out") == ["00000.png", "grid.png", "prompts.jsonl"]
    assert np.array(Image.open(tmp_path / "out" / "00000.png"))[0, 0, 0] == 9


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_leaves_the_old_images_or_the_new_but_never_both(tmp_path, monkeypatch, moment):
    out, count = tmp_path / "out", iter(range(99))
    write_images(solid((1, 1, 1), (1, 1, 1)), ["a", "b"], out)

    def until(method):
        def called(*arguments):
            if next(count) == moment:
                raise KeyboardInterrupt
            return method(*arguments)

        return called

    monkeypatch.setattr(pathlib.Path, "replace", until(pathlib.Path.replace))
    with pytest.raises(KeyboardInterrupt):
        write_images(solid((9, 9, 9), (9, 9, 9)), ["c", "d"], out)
    colours = {np.array(Image.open(path))[0, 0, 0] for path in out.glob("0*.png")}
    assert colours <= {1} or colours <= {9}
    monkeypatch.undo()
    write_images(solid((5, 5, 5)), ["e"], out)
    assert kept(out) == ["00000.png", "grid.png", "prompts.jsonl"]


@pytest.mark.parametrize("name", ["notes.txt", "00000.png", "images"])
def test_what_is_of_no_earlier_run_is_left_alone(tmp_path, name):
    (tmp_path / name).mkdir() if name == "images" else (tmp_path / name).touch()
    with pytest.raises(
        UserError,
        match=f"{tmp_path} holds {name}, which is not one of the images of an earlier run",
    ):
        write_images(solid((9, 9, 9)), ["a"], tmp_path)
    assert kept(tmp_path) == [name]


def test_grid_places_each_image_over_its_label():
    """Lay out five images: rows of three, in reading order; under each a label, and white where
    there is none."""
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    grid = np.array(
        labelled_grid(solid(*colours), ["one", "two", "three", "four", "five"], cell=64)
    )
    cell, label, gap = 64, 45, 8
    assert grid.shape == (2 * (cell + label + gap) + gap, 3 * (cell + gap) + gap, 3)
    for i, colour in enumerate(colours):
        y, x = gap + i // 3 * (cell + label + gap), gap + i % 3 * (cell + gap)
        assert (grid[y : y + cell, x : x + cell] == colour).all()
        assert (grid[y + cell : y + cell + label, x : x + cell] < 100).any(), "no label"
    assert (grid[gap + cell + label + gap :, 2 * (cell + gap) + gap :] == 255).all()


def test_one_image_and_a_label_too_long():
    grid = np.array(labelled_grid(solid((9, 9, 9)), ["a very long prompt " * 40]))
    assert grid.shape == (192 + 45 + 16, 192 + 16, 3)
    assert (grid[:, -8:] == 255).all() and (grid[-8:] == 255).all(), (
        "the label runs out of its cell"
    )


def test_a_grid_shows_the_inputs_of_an_edit_on_the_left():
    """Lay out an edit of two images and one of one image, a row each; the prompt is below all."""
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    one, two, out = solid(*colours)
    grid = np.array(
        labelled_grid([out, out], ["merge", "edit"], cell=64, inputs=[(one, two), (two,)])
    )
    cell, label, gap, arrow = 64, 45, 8, 20
    assert grid.shape == (2 * (cell + label + gap) + gap, 3 * cell + gap + arrow + 2 * gap, 3)
    rows = [
        ((0, colours[0]), (cell + gap, colours[1]), (2 * cell + gap + arrow, colours[2])),
        ((0, colours[1]), (cell + arrow, colours[2])),
    ]
    for number, row in enumerate(rows):
        y = gap + number * (cell + label + gap)
        for x, colour in row:
            assert (grid[y : y + cell, gap + x : gap + x + cell] == colour).all(), (number, x)
        arrows = grid[y : y + cell, gap + row[-1][0] - arrow : gap + row[-1][0]]
        assert (arrows < 100).any(), "no arrow"
