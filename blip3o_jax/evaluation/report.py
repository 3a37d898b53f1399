"""Write the report of a run: one HTML file that contains its style, script and images, and the JSON
that it shows.

`Results` holds the contents of a report; `write_report` writes it. Images are uint8 arrays: HWC,
three channels.
"""

import base64
import collections
import dataclasses
import html
import io
import itertools
import json
import math
import pathlib
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax import files
from blip3o_jax.evaluation import report_charts as charts

CHANGED = 30  # prompts shown before and after, of those whose outcome changed


@dataclasses.dataclass(frozen=True)
class Score:
    """Hold the fractions in [0, 1] of images that show what their prompt asks, over `prompts`
    prompts."""

    name: str
    prompts: int
    model: float  # the model's samples
    random: float  # images that have nothing to do with the prompt
    real: float  # real images with their captions: the accuracy of the scorer itself


@dataclasses.dataclass(frozen=True)
class Sample:
    """Hold one image of the model with its prompt and outcome."""

    prompt: str
    category: str
    image_HWC: np.ndarray
    correct: bool
    reason: str  # what the scorer found, in a few words


@dataclasses.dataclass(frozen=True)
class Curve:
    """Hold one metric over the steps of a stage, and where it was computed on held-out records too,
    (steps, values) of those; non-finite values are left out of the chart."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    held_out: tuple[Sequence[int], Sequence[float]] | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """Hold the curves of one training stage."""

    name: str
    curves: Sequence[Curve]
    note: str = ""  # one sentence under the heading


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Hold an image and its reconstruction."""

    original_HWC: np.ndarray
    reconstruction_HWC: np.ndarray


@dataclasses.dataclass(frozen=True)
class TokenMap:
    """Hold an image and its token ids."""

    image_HWC: np.ndarray
    ids_HW: np.ndarray  # codebook indices, one per image token
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Before:
    """Hold the scores and samples of the model before its last stage, for the same prompts in the
    order of `Scored`."""

    overall: Score
    categories: Sequence[Score]
    samples: Sequence[Sample]


@dataclasses.dataclass(frozen=True)
class ImageTaskExample:
    """Hold a reference image and the model's output for it: another image, or text."""

    image_HWC: np.ndarray
    instruction: str
    output_HWC: np.ndarray | None
    answer: str
    correct: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class ImageTask:
    """Hold the results of a suite with reference images: the fractions of correct outputs of the
    model and of the baseline, and examples."""

    name: str
    note: str
    baseline: str  # in words
    scores: Sequence[
        tuple[str, int, float, float]
    ]  # category, number of prompts, model's fraction, baseline's; overall comes last
    examples: Sequence[ImageTaskExample]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Hold the image sampled for a held-out caption, the held-out picture of that caption, and the
    picture of the training set that is nearest to the sample."""

    caption: str
    sample_HWC: np.ndarray
    truth_HWC: np.ndarray
    nearest_HWC: np.ndarray
    nearest_caption: str
    distance: float  # of sample and nearest picture: root mean square error over pixels, of 255


@dataclasses.dataclass(frozen=True)
class HeldOutCaptions:
    """Hold the samples for held-out captions: `matched` is the fraction of samples that are nearer
    to the picture of their caption than to those of the other captions of a group of `choices`."""

    matched: float
    choices: int
    comparisons: Sequence[Comparison]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Hold the samples that a scorer has judged, before and after the last stage."""

    overall: Score
    categories: Sequence[Score]
    samples: Sequence[Sample]
    before: Before


@dataclasses.dataclass(frozen=True)
class Results:
    """Hold the contents of a report: of samples that are `scored`, or of `held_out` captions. The
    prompts of the samples and the images of `reconstructions` must be held out from training, as
    the page says."""

    title: str
    subtitle: str
    stages: Sequence[Stage]
    reconstructions: Sequence[Reconstruction]
    token_maps: Sequence[TokenMap]
    seconds: Mapping[str, float]  # of every part of the run, in order
    facts: Mapping[
        str, str
    ]  # shown next to the headline: {"parameters": "12.3 M", "peak memory": "3.1 GiB"}
    configuration: Mapping[str, Any]  # nested; each top-level key gets its own table
    versions: Mapping[str, str]
    scored: Scored | None = None
    image_tasks: Sequence[ImageTask] = ()
    held_out: HeldOutCaptions | None = None


def write_report(results: Results, out_html: pathlib.Path) -> None:
    """Write `out_html`, and a file of the same name with .json."""
    out_html = pathlib.Path(out_html)
    text = pathlib.Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = string.Template(_with_sections(text, results)).substitute(
        title=_text(results.title),
        subtitle=_text(results.subtitle),
        headline=_headline(results),
        image_tasks="".join(map(_image_task, results.image_tasks)),
        stages="".join(map(_stage, results.stages)),
        reconstructions="".join(map(_reconstruction, results.reconstructions)),
        token_maps="".join(map(_token_map, results.token_maps)),
        times=_times(results.seconds),
        configuration="".join(
            _settings(name, value) for name, value in results.configuration.items()
        ),
        versions=_table(results.versions.items()),
        **(_scored(results.scored) if results.scored else {}),
        **(_held_out(results.held_out) if results.held_out else {}),
    )
    files.replace_text(out_html, page)
    files.replace_text(
        out_html.with_suffix(".json"), json.dumps(to_json(results), indent=1, allow_nan=False)
    )


def _with_sections(text: str, results: Results) -> str:
    """Return the template without the sections `<!-- if NAME -->` ... `<!-- end NAME -->` of what
    `results` does not have."""
    for name in ("scored", "image_tasks", "held_out"):
        if not getattr(results, name):
            text = re.sub(rf"<!-- if {name} -->.*?<!-- end {name} -->\n", "", text, flags=re.S)
    return text


def _scored(scored: Scored) -> dict[str, str]:
    """Return the contents of the sections on scores, samples and reinforcement learning."""
    changed = [
        pair
        for pair in zip(scored.before.samples, scored.samples, strict=True)
        if pair[0].correct != pair[1].correct
    ]
    return {
        "scoreboard": _scoreboard(scored),
        "filters": _filters(scored.samples),
        "samples": "".join(map(_sample, _take_turns(scored.samples))),
        "changes": _changes(scored),
        "changed": "".join(itertools.starmap(_changed, changed[:CHANGED])),
        "changed_counts": _changed_counts(changed),
    }


def _held_out(held_out: HeldOutCaptions) -> dict[str, str]:
    return {"comparisons": "".join(map(_comparison, held_out.comparisons))}


def _comparison(comparison: Comparison) -> str:
    shown = (
        ("sample", comparison.sample_HWC, comparison.caption),
        ("its own picture", comparison.truth_HWC, comparison.caption),
        ("nearest in training", comparison.nearest_HWC, comparison.nearest_caption),
    )
    images = "".join(
        f"<div>{_img(image, f'{name}: {caption}')}<small>{name}</small></div>"
        for name, image, caption in shown
    )
    return (
        f'<figure class="triple"><div>{images}</div><figcaption>'
        f'<span class="prompt">{_text(comparison.caption)}</span>'
        f'<span class="reason">nearest: {_text(comparison.nearest_caption)}, '
        f"{comparison.distance:.0f} of 255</span></figcaption></figure>"
    )


def to_json(value: Any) -> Any:
    """Convert `Results` to plain JSON values: images become PNG data URIs, id grids nested lists,
    non-finite numbers null."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return data_uri(value) if value.dtype == np.uint8 and value.ndim == 3 else value.tolist()
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_json(v) for v in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def data_uri(image_HWC: np.ndarray) -> str:
    """Return a uint8 image [height, width, 3] as a PNG data URI."""
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[-1] != 3:
        raise ValueError(
            f"a report's image must be uint8 [height, width, 3], not {image_HWC.dtype} "
            f"{image_HWC.shape}"
        )
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _img(image_HWC: np.ndarray, alt: str) -> str:
    # Small images are shown enlarged: as the pixels they are, not blurred.
    style = ' class="pixels"' if max(image_HWC.shape[:2]) <= 128 else ""
    return f'<img{style} src="{data_uri(image_HWC)}" alt="{_text(alt)}">'


def _headline(results: Results) -> str:
    share, claim = 0.0, ""
    facts: dict[str, str] = {}
    if results.scored:
        overall = results.scored.overall
        share, claim = overall.model, f"of {overall.prompts:,} held-out prompts drawn as asked"
        facts = {
            "random images": _percent(overall.random),
            "scorer on real images": _percent(overall.real),
        }
    elif results.held_out:
        held_out = results.held_out
        count, others = len(held_out.comparisons), held_out.choices - 1
        share = held_out.matched
        claim = (
            f"of {count:,} samples nearer to their caption's own picture than to {others} others"
        )
        facts = {"by chance": _percent(1 / held_out.choices)}
    facts |= {"whole run": _duration(sum(results.seconds.values())), **results.facts}
    tiles = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts.items())
    return (
        f'<p class="hero"><strong>{_percent(share)}</strong> <span>{claim}</span></p>'
        f'<dl class="tiles">{tiles}</dl>'
    )


def _scoreboard(scored: Scored) -> str:
    rows = []
    for score in (*scored.categories, scored.overall):
        total = ' class="total"' if score is scored.overall else ""
        marks = "".join(
            f'<i class="{kind}" style="left:{100 * share:.2f}%"></i>'
            for kind, share in (("random", score.random), ("real", score.real))
        )
        rows.append(
            f'<tr{total}><th scope="row">{_text(_words(score.name))}</th>'
            f"{_bar(score.model, score.prompts, marks)}"
            f"<td>{_with_interval(score.model, score.prompts)}</td>"
            f"<td>{_percent(score.random)}</td>"
            f"<td>{_percent(score.real)}</td><td>{score.prompts:,}</td></tr>"
        )
    return "".join(rows) + _scale(4)


def _bar(share: float, count: int, marks: str) -> str:
    """Return the cell with a bar of a fraction of `count` prompts, its interval, and `marks`."""
    low, high = charts.wilson_interval(share, count)
    return (
        f'<td class="bar"><span class="track"><b style="width:{100 * share:.2f}%"></b>'
        f'<u style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></u>{marks}</span></td>'
    )


def _with_interval(share: float, count: int) -> str:
    low, high = charts.wilson_interval(share, count)
    return f"<strong>{_percent(share)}</strong> <small>{100 * low:.0f} to {100 * high:.0f}</small>"


def _scale(columns: int) -> str:
    """Return the row below bars that says where which fraction lies, with `columns` cells after."""
    ticks = "".join(f'<span style="left:{tick}%">{tick} %</span>' for tick in (0, 25, 50, 75, 100))
    return (
        f'<tr class="scale"><td></td><td class="bar"><div>{ticks}</div></td>'
        f'<td colspan="{columns}">95 % interval, Wilson</td></tr>'
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _filters(samples: Sequence[Sample]) -> str:
    categories = collections.Counter(s.category for s in samples)
    right = sum(s.correct for s in samples)
    outcomes = {"right": right, "wrong": len(samples) - right}
    return _buttons("category", categories, len(samples)) + _buttons(
        "outcome", outcomes, len(samples)
    )


def _buttons(kind: str, counts: Mapping[str, int], total: int) -> str:
    buttons = "".join(
        f'<button type="button" data-{kind}="{_text(value)}" '
        f'aria-pressed="{"false" if value else "true"}">'
        f"{_text(_words(value) or 'all')} <small>{count}</small></button>"
        for value, count in (("", total), *counts.items())
    )
    return f'<div role="group" aria-label="{kind}">{buttons}</div>'


def _take_turns(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples with the categories in turn, so that the first rows show all of them;
    within a category the order stays."""
    queues: dict[str, list[Sample]] = {}
    for sample in samples:
        queues.setdefault(sample.category, []).append(sample)
    rounds = itertools.zip_longest(*queues.values())
    return [sample for round_ in rounds for sample in round_ if sample is not None]


def _sample(sample: Sample) -> str:
    outcome, mark = ("right", "✓") if sample.correct else ("wrong", "✗")
    reason = f'<span class="reason">{_text(sample.reason)}</span>' if sample.reason else ""
    return (
        f'<figure class="sample" data-category="{_text(sample.category)}" data-outcome="{outcome}">'
        f"{_img(sample.image_HWC, sample.prompt)}<figcaption>"
        f'<span class="outcome {outcome}">{mark} {outcome}</span><span '
        f'class="category">{_text(_words(sample.category))}</span>'
        f'<span class="prompt">{_text(sample.prompt)}</span>{reason}</figcaption></figure>'
    )


def _changes(scored: Scored) -> str:
    """Return the rows of the table of scores before and after the last stage."""
    rows = []
    pairs = zip(
        (*scored.before.categories, scored.before.overall),
        (*scored.categories, scored.overall),
        strict=True,
    )
    for before, after in pairs:
        total, change = (
            ' class="total"' if after is scored.overall else "",
            100 * (after.model - before.model),
        )
        rows.append(
            f'<tr{total}><th scope="row">{_text(_words(after.name))}</th>'
            + _bar(after.model, after.prompts, f'<i style="left:{100 * before.model:.2f}%"></i>')
            + f"<td>{_percent(before.model)}</td>"
            f"<td>{_with_interval(after.model, after.prompts)}</td>"
            f"<td>{change:+.1f}</td></tr>"
        )
    return "".join(rows) + _scale(3)


def _changed_counts(changed: Sequence[tuple[Sample, Sample]]) -> str:
    better = sum(after.correct for _, after in changed)
    extent = f"the first {CHANGED} of them" if len(changed) > CHANGED else "all of them"
    counts = f"{better} prompts became right and {len(changed) - better} wrong"
    return f"{counts}; {extent}, before and after:"


def _changed(before: Sample, after: Sample) -> str:
    outcome, words = ("right", "now right") if after.correct else ("wrong", "now wrong")
    reason = f"before: {before.reason}" if after.correct else f"after: {after.reason}"
    return (
        f'<figure class="pair"><div>{_img(before.image_HWC, "before: " + before.prompt)}'
        f'{_img(after.image_HWC, "after: " + after.prompt)}</div><figcaption><span class="outcome '
        f'{outcome}">{words}</span> '
        f'<span class="prompt">{_text(after.prompt)}</span><span class="reason">{_text(reason)}'
        "</span></figcaption></figure>"
    )


def _image_task(suite: ImageTask) -> str:
    rows = []
    for i, (name, count, model, baseline) in enumerate(suite.scores, 1):
        total = ' class="total"' if i == len(suite.scores) else ""
        rows.append(
            f'<tr{total}><th scope="row">{_text(_words(name))}</th>'
            + _bar(model, count, f'<i class="random" style="left:{100 * baseline:.2f}%"></i>')
            + f"<td>{_with_interval(model, count)}</td><td>{_percent(baseline)}</td>"
            f"<td>{count:,}</td></tr>"
        )
    names = ("model", suite.baseline, "prompts")
    head = '<th scope="col">Category</th><th class="bar"></th>' + "".join(
        f'<th scope="col">{_text(n)}</th>' for n in names
    )
    return (
        f'<h3>{_text(_words(suite.name))}</h3><p class="note">{_text(suite.note)}</p>'
        f'<div class="card"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}{_scale(3)}</tbody></table></div></div>"
        f'<div class="pairs examples">{"".join(map(_example, suite.examples))}</div>'
    )


def _example(example: ImageTaskExample) -> str:
    outcome, mark = ("right", "✓") if example.correct else ("wrong", "✗")
    output = (
        ""
        if example.output_HWC is None
        else _img(example.output_HWC, "output: " + example.instruction)
    )
    answer = f"<strong>{_text(example.answer)}</strong>" if example.answer else ""
    return (
        f'<figure class="pair"><div>'
        f"{_img(example.image_HWC, 'reference: ' + example.instruction)}{output}</div><figcaption>"
        f'<span class="outcome {outcome}">{mark} {outcome}</span> '
        f'<span class="prompt">{_text(example.instruction)} {answer}</span>'
        f'<span class="reason">{_text(example.reason)}</span></figcaption></figure>'
    )


def _stage(stage: Stage) -> str:
    note = f'<p class="note">{_text(stage.note)}</p>' if stage.note else ""
    curves = "".join(
        charts.line_chart(_words(c.name), c.steps, c.values, c.held_out) for c in stage.curves
    )
    return f'<h3>{_text(_words(stage.name))}</h3>{note}<div class="charts">{curves}</div>'


def _reconstruction(pair: Reconstruction) -> str:
    original, got = (x.astype(np.float64) for x in (pair.original_HWC, pair.reconstruction_HWC))
    error = np.mean((original - got) ** 2)
    psnr = f"{10 * math.log10(255**2 / error):.1f} dB" if error else "identical"
    return (
        f'<figure class="pair"><div>{_img(pair.original_HWC, "original")}'
        f"{_img(pair.reconstruction_HWC, 'reconstruction')}</div><figcaption>PSNR {psnr}"
        "</figcaption></figure>"
    )


def _token_map(token_map: TokenMap) -> str:
    ids_HW = np.asarray(token_map.ids_HW)
    rows, columns = ids_HW.shape
    data = ",".join(map(str, ids_HW.ravel().tolist()))
    caption = f'<span class="prompt">{_text(token_map.caption)}</span>' if token_map.caption else ""
    alt = f"{rows} x {columns} token ids as colours"
    colours = f'<img class="pixels" src="{data_uri(charts.colours(ids_HW))}" alt="{alt}">'
    return (
        f'<figure class="pair tokens" data-columns="{columns}" data-ids="{data}">'
        f"<div>{_img(token_map.image_HWC, token_map.caption or 'image')}{colours}</div><figcaption>"
        f"<output>{ids_HW.size} tokens, {len(np.unique(ids_HW))} different</output>{caption}"
        "</figcaption></figure>"
    )


def _times(seconds: Mapping[str, float]) -> str:
    longest = max(seconds.values(), default=0) or 1
    return "".join(
        f'<tr><th scope="row">{_text(_words(name))}</th><td class="bar"><span class="track plain">'
        f'<b style="width:{100 * value / longest:.2f}%"></b></span></td><td>{_duration(value)}</td>'
        "</tr>"
        for name, value in seconds.items()
    )


def _settings(name: str, value: Any) -> str:
    return f"<details><summary>{_text(_words(name))}</summary>{_table(_flatten(value))}</details>"


def _flatten(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{_text(key)}</th><td>{_text(value)}</td></tr>' for key, value in rows
    )
    return f'<div class="scroll"><table class="settings"><tbody>{body}</tbody></table></div>'
