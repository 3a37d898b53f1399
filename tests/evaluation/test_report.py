import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest

from blip3o_jax.evaluation import report, report_html, report_sections
from blip3o_jax.evaluation import report_charts as charts
from blip3o_jax.evaluation import report_contents as contents

NASTY = "a \"red\" <script>alert(1)</script> & 'circle' $title"


def results(rng: np.random.Generator) -> contents.Results:
    """Return a small run in every respect: names with underscores, prompts that look like markup, a
    loss that was not finite."""

    def image(side: int = 8) -> np.ndarray:
        return rng.integers(0, 256, (side, side, 3), dtype=np.uint8)

    samples = [
        contents.Sample(
            f"{NASTY} {i}",
            ("single", "two_objects")[i // 2],
            image(),
            bool(i % 2),
            "no <circle> found",
        )
        for i in range(4)
    ]
    curves = [
        contents.Curve("flow", range(10), np.linspace(2, 1, 10), ([0, 9], [2.0, 1.5])),
        contents.Curve("grad_norm", [0, 1, 2], [100.0, float("nan"), 0.5]),
        contents.Curve("empty", [], []),
    ]
    return contents.Results(
        title=NASTY,
        subtitle="a test",
        scored=contents.Scored(
            overall=contents.Score("overall", 4, 0.5, 0.01, 0.995),
            categories=[
                contents.Score("single", 2, 0.5, 0.0, 1.0),
                contents.Score("two_objects", 2, 0.5, 0.02, 0.99),
            ],
            samples=samples,
            before=contents.Before(
                contents.Score("overall", 4, 0.25, 0.01, 0.995),
                [
                    contents.Score("single", 2, 0.75, 0.0, 1.0),
                    contents.Score("two_objects", 2, 0.5, 0.02, 0.99),
                ],
                [
                    dataclasses.replace(s, correct=i == 0, image_HWC=image())
                    for i, s in enumerate(samples)
                ],
            ),
        ),
        image_tasks=[
            contents.ImageTask(
                "shapes_edit",
                "edits & more",
                "input unchanged",
                [("recolour", 3, 0.625, 0.125), ("overall", 3, 0.625, 0.125)],
                [contents.ImageTaskExample(image(), NASTY, image(), "", True, "as asked")],
            ),
            contents.ImageTask(
                "shapes_qa",
                "",
                "most frequent",
                [("overall", 1, 0.0, 1.0)],
                [contents.ImageTaskExample(image(), "who?", None, NASTY, False, "")],
            ),
        ],
        stages=[contents.Stage("autoencoder", curves, note="L1 & gradients")],
        reconstructions=[contents.Reconstruction(image(), image())],
        token_maps=[contents.TokenMap(image(), rng.integers(0, 50, (2, 3)), NASTY)],
        seconds={"data": 3.25, "joint_training": 3700.0},
        facts={"parameters": "1.2 M"},
        configuration={"joint": {"model": {"ar": {"hidden_size": 8}}, "trainable": []}},
        versions={"jax": "0.10"},
    )


class Page(html.parser.HTMLParser):
    """Parse elements with their attributes, the text outside style and script, and whether tags
    close in order."""

    VOID = ("meta", "img", "line", "circle", "path")

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def named(self, tag: str, cls: str = "") -> list[dict]:
        return [a for t, a in self.elements if t == tag and cls in (a.get("class") or "")]


@pytest.fixture
def written(tmp_path, rng):
    path = tmp_path / "deep" / "report.html"
    report.write_report(results(rng), path)
    return path


@pytest.fixture
def page(written):
    return Page(written.read_text(encoding="utf-8"))


def test_every_section_is_drawn(page):
    assert page.open == []
    assert len(page.named("figure", "sample")) == 4
    assert len(page.named("figure", "chart")) == 3 and len(page.named("svg")) == 2
    assert len(page.named("figure", "pair")) == 2 + 2 + 3
    text = " ".join(page.words)
    for words in (
        "50.0 %",
        "1.0 %",
        "99.5 %",
        "1 h 01 min",
        "3.2 s",
        "two objects",
        "no values",
        "model.ar.hidden_size",
        "62.5 %",
        "12.5 %",
        "input unchanged",
        "shapes edit",
        "who?",
    ):
        assert words in text, words


def test_prompts_that_became_right_or_wrong_are_counted(page):
    text = " ".join(page.words)
    assert "2 prompts became right and 1 wrong; all of them, before and after:" in text
    assert [words for words in page.words if words.startswith("now ")] == [
        "now wrong",
        "now right",
        "now right",
    ]
    for words in ("75.0 %", "-25.0", "+0.0", "25.0 %", "+25.0"):
        assert words in text, words


def test_of_many_changes_the_first_are_shown(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(report_sections, "CHANGED", 2)
    report.write_report(results(rng), tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.named("figure", "pair")) == 2 + 2 + 2
    assert "2 prompts became right and 1 wrong; the first 2 of them, before and after:" in " ".join(
        page.words
    )


def test_nothing_outside_the_file_is_asked_for(written, page):
    sources = [
        a[k]
        for _, a in page.elements
        for k in ("src", "href", "srcset", "poster", "data")
        if k in a
    ]
    assert sources and all(s.startswith("data:image/png;base64,") for s in sources)
    text = written.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|fetch\(", text)
    assert {t for t, _ in page.elements} & {"link", "iframe", "object", "embed", "base"} == set()


def test_prompts_are_text_and_never_markup(page):
    assert len(page.named("script")) == 1
    assert page.words.count(NASTY) == 4  # title, heading, token map, what was said
    assert f"{NASTY} 0" in page.words and page.named("img")[0]["alt"] == f"{NASTY} 0"


def test_samples_can_be_filtered_and_take_turns(page):
    cards = page.named("figure", "sample")
    assert [c["data-category"] for c in cards] == ["single", "two_objects"] * 2
    assert [c["data-outcome"] for c in cards] == ["wrong", "wrong", "right", "right"]
    buttons = page.named("button")
    assert [b["data-category"] for b in buttons if "data-category" in b] == [
        "",
        "single",
        "two_objects",
    ]
    assert [b["data-outcome"] for b in buttons if "data-outcome" in b] == ["", "right", "wrong"]


def test_the_json_holds_what_was_drawn(written, rng):
    saved = json.loads(written.with_suffix(".json").read_text(encoding="utf-8"))
    assert set(saved) == {f.name for f in dataclasses.fields(contents.Results)}
    assert saved["scored"]["samples"][0]["prompt"] == f"{NASTY} 0"
    assert saved["scored"]["samples"][0]["image_HWC"].startswith("data:image/png;base64,")
    assert saved["stages"][0]["curves"][1]["values"] == [100.0, None, 0.5]
    assert np.shape(saved["token_maps"][0]["ids_HW"]) == (2, 3)


def test_samples_of_held_out_captions_are_shown_with_real_pictures(tmp_path, rng):
    image = lambda: rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    comparisons = [
        contents.Comparison(f"{NASTY} {i}", image(), image(), image(), "a near one", 31.4)
        for i in range(3)
    ]
    found = dataclasses.replace(
        results(rng),
        scored=None,
        image_tasks=(),
        held_out=contents.HeldOutCaptions(0.75, 10, comparisons),
    )
    report.write_report(found, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == [] and page.named("section", "") and not page.named("button")
    assert len(page.named("figure", "triple")) == 3 and not page.named("figure", "sample")
    names = [img["alt"].partition(":")[0] for img in page.named("img")][:3]
    assert names == ["sample", "its own picture", "nearest in training"]
    text = " ".join(page.words)
    for words in (
        "75.0 %",
        "of 3 samples nearer to their caption's own picture than to 9 others",
        "10.0 %",
        "nearest: a near one, 31 of 255",
        f"{NASTY} 2",
    ):
        assert words in text, words
    assert "Scoreboard" not in text and "Reinforcement" not in text


def test_an_image_of_another_kind_is_refused():
    with pytest.raises(
        ValueError, match=r"must be uint8 \[height, width, 3\], not float32 \(2, 2, 3\)"
    ):
        report_html.data_uri(np.zeros((2, 2, 3), np.float32))


def _points(svg: str) -> list[list[float]]:
    return json.loads(Page(svg).named("svg")[0]["data-points"])


def test_a_line_lies_inside_its_frame_and_keeps_its_ends(rng):
    values = np.exp(-np.arange(5000) / 1000) + 0.01 * rng.standard_normal(5000)
    points = _points(charts.line_chart("loss", range(5000), values))
    assert len(points) == charts.MAX_POINTS
    assert points[-1][0] == 4999 and points[-1][1] == pytest.approx(values[-1], rel=1e-3)
    assert all(charts.LEFT <= x <= charts.WIDTH - charts.RIGHT for _, _, x, _ in points)
    assert all(charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM for _, _, _, y in points)


def test_higher_values_stand_higher_on_both_scales():
    for values in ([3.0, 2.0, 1.0], [1000.0, 1.0, 0.001]):
        heights = [y for *_, y in _points(charts.line_chart("x", [0, 1, 2], values))]
        assert heights == sorted(heights) and heights[0] < heights[-1]
        # Evenly spaced on its own scale: the middle value stands in the middle.
        assert heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=0.1)


def test_a_held_out_curve_is_dashed_and_widens_the_axes():
    svg = charts.line_chart("loss", [0, 1], [1.0, 0.5], ([0, 2], [1.2, 3.0]))
    assert "held out, last 3" in svg
    dashed = [a["d"] for a in Page(svg).named("path", "held-out")]
    assert len(dashed) == 1
    numbers = [float(x) for x in re.findall(r"[0-9.]+", dashed[0])]
    assert min(numbers[1::2]) >= charts.TOP - 1e-6
    assert max(numbers[::2]) <= charts.WIDTH - charts.RIGHT
    assert "held out" not in charts.line_chart("loss", [0, 1], [1.0, 0.5])


def test_the_interval_of_a_fraction():
    """Check against values computed by statsmodels.stats.proportion.proportion_confint."""
    assert charts.wilson_interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-4)
    assert charts.wilson_interval(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert charts.wilson_interval(1.0, 0) == (0.0, 1.0)


def test_bars_have_an_interval_and_a_scale(page):
    assert len(page.named("u")) == 3 + 3 + 3  # scores, changes, suites
    assert len(page.named("tr", "scale")) == 1 + 1 + 2
    # Half of two prompts, and half of four.
    assert "9 to 91" in page.words and "15 to 85" in page.words


def test_ticks_are_round_and_hold_the_values():
    assert charts._ticks(0.0, 0.2) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert charts._ticks(0.0, 0.4) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert charts._ticks(300.0, 356.0) == pytest.approx([300, 320, 340, 360])
    assert charts._ticks(10.0, 1490.0, inside=True) == pytest.approx([500, 1000])
    assert charts._log_ticks(0.02, 900.0) == pytest.approx([0.1, 1, 10, 100])
    assert charts._log_ticks(3.0, 150.0) == pytest.approx([5, 10, 20, 50, 100])


@pytest.mark.parametrize("values", ([3.0], [0.0, 0.0], [5.0, 5.0], [-1.0, -1.0], [1e-9, 2e-9]))
def test_flat_and_tiny_lines_are_drawn(values):
    points = _points(charts.line_chart("x", range(len(values)), values))
    assert np.isfinite(points).all()


def test_an_id_keeps_its_colour_in_every_map():
    first, second = (
        charts.colours(np.array([[3, 9], [9, 700]])),
        charts.colours(np.array([[700, 3]])),
    )
    assert first.dtype == np.uint8 and first.shape == (2, 2, 3)
    assert (first[1, 1] == second[0, 0]).all() and (first[0, 0] == second[0, 1]).all()
    assert (first[0, 1] == first[1, 0]).all() and (first[0, 0] != first[0, 1]).any()
