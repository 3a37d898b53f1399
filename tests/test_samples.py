import json

import numpy as np
from PIL import Image

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
        {"file_name": path.name, "prompt": prompt} for path, prompt in zip(paths, prompts, strict=True)
    ]
    assert (tmp_path / "deep" / "out" / "grid.png").exists()


def test_grid_places_each_image_over_its_label():
    """Five images: rows of three, in reading order; under each a label, and white where there is none."""
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    grid = np.array(labelled_grid(solid(*colours), ["one", "two", "three", "four", "five"], cell=64))
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
    assert (grid[:, -8:] == 255).all() and (grid[-8:] == 255).all(), "the label runs out of its cell"
