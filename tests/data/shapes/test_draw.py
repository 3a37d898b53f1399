import numpy as np
import pytest

from blip3o_jax.data.shapes import draw, font, scene, vocabulary

AREAS = {
    "circle": np.pi * 0.49**2,
    "square": 0.98**2,
    "triangle": 0.44,
    "cross": 2 * 0.36 - 0.36**2,
    "ring": np.pi / 4 * 0.75,
}


@pytest.mark.parametrize("shape", AREAS)
def test_coverage_has_the_shape_s_area(shape: str) -> None:
    """Compare at 24 px; the polygon's boundary is filled too, half of an eighth of a pixel around
    an outline of about 80 px."""
    covered, _, _ = draw.coverage(shape, 0.503, 0.497, 24 / 64, 64)
    assert covered.sum() == pytest.approx(AREAS[shape] * 24**2, rel=0.03)
    assert covered.min() >= 0 and covered.max() == 1


def test_coverage_moves_with_subpixels() -> None:
    for x in (0.4, 0.4 + 0.25 / 64, 0.4 + 0.5 / 64):
        covered, rows, columns = draw.coverage("circle", x, 0.5, 0.3, 64)
        grid_x = np.arange(64)[columns] + 0.5
        assert (covered.sum(0) @ grid_x) / covered.sum() / 64 == pytest.approx(x, abs=0.1 / 64)
        assert covered.shape == (rows.stop - rows.start, columns.stop - columns.start)


def test_coverage_is_cut_at_the_border() -> None:
    covered, rows, columns = draw.coverage("square", 0.0, 0.5, 0.5, 64)
    assert columns.start == 0 and covered.shape == (rows.stop - rows.start, 16)
    assert draw.coverage("square", -2.0, 0.5, 0.5, 64)[0].size == 0


def test_render_paints_the_asked_colour_on_light_paper() -> None:
    for index in range(70):
        drawn = scene.sample(0, index, "train")
        image = draw.render(drawn, 64)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        for thing in drawn.things:
            if thing.shape != "ring":
                assert (
                    tuple(image[int(thing.y * 64), int(thing.x * 64)])
                    == vocabulary.COLOURS[thing.colour]
                )
        corner = image[0, 0].astype(int)
        assert corner.min() > 180 and np.ptp(corner) < 25


def test_resolution_changes_nothing_but_resolution() -> None:
    """Average 128 px down by 2 to the 64 px image, up to rounding (to whole grey levels and to a
    polygon's fixed-point coordinates, at the edges): mean error below half a level."""
    for index in range(7):
        drawn = scene.sample(0, index, "train")
        if drawn.background.kind in ("plain", "gradient"):
            large = draw.render(drawn, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
            assert np.abs(large - draw.render(drawn, 64)).mean() < 0.5


def test_word_coverage_is_exact() -> None:
    word = scene.Word("TIE", 0.51, 0.47)
    covered, _, _ = draw.word_coverage(word, 64)
    cell = scene.LETTER_CELL * 64
    assert covered.sum() == pytest.approx(font.bitmap("TIE").sum() * cell**2, rel=1e-4)


def test_font_letters_fill_their_cells_and_differ() -> None:
    assert set(font.GLYPHS) == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    for letter, glyph in font.GLYPHS.items():
        assert glyph.shape == (font.HEIGHT, font.WIDTH)
        assert all(side.any() for side in (glyph[0], glyph[-1], glyph[:, 0], glyph[:, -1])), letter
        assert all(
            (glyph != other).sum() >= 3 for name, other in font.GLYPHS.items() if name != letter
        ), letter
    with pytest.raises(ValueError, match="cannot write 'NO!'"):
        font.bitmap("NO!")
