"""Format the sections of a report as HTML, one function per section or figure.

All text of a run passes through `escape`: prompts and answers may look like markup.
"""

import collections
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.evaluation import report_charts as charts
from blip3o_jax.evaluation.report_contents import (
    Comparison,
    HeldOutCaptions,
    ImageTask,
    ImageTaskExample,
    Reconstruction,
    Results,
    Sample,
    Scored,
    Stage,
    TokenMap,
)
from blip3o_jax.evaluation.report_html import (
    bar,
    data_uri,
    duration,
    escape,
    img,
    label,
    percent,
    scale,
    table,
    with_interval,
)

CHANGED = 30  # prompts shown before and after, of those whose outcome changed


def scored_sections(scored: Scored) -> dict[str, str]:
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


def held_out_section(held_out: HeldOutCaptions) -> dict[str, str]:
    return {"comparisons": "".join(map(_comparison, held_out.comparisons))}


def _comparison(comparison: Comparison) -> str:
    shown = (
        ("sample", comparison.sample_HWC, comparison.caption),
        ("its own picture", comparison.truth_HWC, comparison.caption),
        ("nearest in training", comparison.nearest_HWC, comparison.nearest_caption),
    )
    images = "".join(
        f"<div>{img(image, f'{name}: {caption}')}<small>{name}</small></div>"
        for name, image, caption in shown
    )
    return (
        f'<figure class="triple"><div>{images}</div><figcaption>'
        f'<span class="prompt">{escape(comparison.caption)}</span>'
        f'<span class="reason">nearest: {escape(comparison.nearest_caption)}, '
        f"{comparison.distance:.0f} of 255</span></figcaption></figure>"
    )


def headline(results: Results) -> str:
    fraction, claim = 0.0, ""
    facts: dict[str, str] = {}
    if results.scored:
        overall = results.scored.overall
        fraction, claim = overall.model, f"of {overall.prompts:,} held-out prompts drawn as asked"
        facts = {
            "random images": percent(overall.random),
            "scorer on real images": percent(overall.real),
        }
    elif results.held_out:
        held_out = results.held_out
        count, others = len(held_out.comparisons), held_out.choices - 1
        fraction = held_out.matched
        claim = (
            f"of {count:,} samples nearer to their caption's own picture than to {others} others"
        )
        facts = {"by chance": percent(1 / held_out.choices)}
    facts |= {"whole run": duration(sum(results.seconds.values())), **results.facts}
    tiles = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()
    )
    return (
        f'<p class="hero"><strong>{percent(fraction)}</strong> <span>{claim}</span></p>'
        f'<dl class="tiles">{tiles}</dl>'
    )


def _scoreboard(scored: Scored) -> str:
    rows = []
    for score in (*scored.categories, scored.overall):
        total = ' class="total"' if score is scored.overall else ""
        marks = "".join(
            f'<i class="{kind}" style="left:{100 * fraction:.2f}%"></i>'
            for kind, fraction in (("random", score.random), ("real", score.real))
        )
        rows.append(
            f'<tr{total}><th scope="row">{escape(label(score.name))}</th>'
            f"{bar(score.model, score.prompts, marks)}"
            f"<td>{with_interval(score.model, score.prompts)}</td>"
            f"<td>{percent(score.random)}</td>"
            f"<td>{percent(score.real)}</td><td>{score.prompts:,}</td></tr>"
        )
    return "".join(rows) + scale(4)


def _filters(samples: Sequence[Sample]) -> str:
    categories = collections.Counter(s.category for s in samples)
    right = sum(s.correct for s in samples)
    outcomes = {"right": right, "wrong": len(samples) - right}
    return _buttons("category", categories, len(samples)) + _buttons(
        "outcome", outcomes, len(samples)
    )


def _buttons(kind: str, counts: Mapping[str, int], total: int) -> str:
    buttons = "".join(
        f'<button type="button" data-{kind}="{escape(value)}" '
        f'aria-pressed="{"false" if value else "true"}">'
        f"{escape(label(value) or 'all')} <small>{count}</small></button>"
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
    reason = f'<span class="reason">{escape(sample.reason)}</span>' if sample.reason else ""
    return (
        f'<figure class="sample" data-category="{escape(sample.category)}" '
        f'data-outcome="{outcome}">'
        f"{img(sample.image_HWC, sample.prompt)}<figcaption>"
        f'<span class="outcome {outcome}">{mark} {outcome}</span><span '
        f'class="category">{escape(label(sample.category))}</span>'
        f'<span class="prompt">{escape(sample.prompt)}</span>{reason}</figcaption></figure>'
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
            f'<tr{total}><th scope="row">{escape(label(after.name))}</th>'
            + bar(after.model, after.prompts, f'<i style="left:{100 * before.model:.2f}%"></i>')
            + f"<td>{percent(before.model)}</td>"
            f"<td>{with_interval(after.model, after.prompts)}</td>"
            f"<td>{change:+.1f}</td></tr>"
        )
    return "".join(rows) + scale(3)


def _changed_counts(changed: Sequence[tuple[Sample, Sample]]) -> str:
    better = sum(after.correct for _, after in changed)
    extent = f"the first {CHANGED} of them" if len(changed) > CHANGED else "all of them"
    counts = f"{better} prompts became right and {len(changed) - better} wrong"
    return f"{counts}; {extent}, before and after:"


def _changed(before: Sample, after: Sample) -> str:
    outcome, words = ("right", "now right") if after.correct else ("wrong", "now wrong")
    reason = f"before: {before.reason}" if after.correct else f"after: {after.reason}"
    return (
        f'<figure class="pair"><div>{img(before.image_HWC, "before: " + before.prompt)}'
        f'{img(after.image_HWC, "after: " + after.prompt)}</div><figcaption><span class="outcome '
        f'{outcome}">{words}</span> '
        f'<span class="prompt">{escape(after.prompt)}</span><span class="reason">{escape(reason)}'
        "</span></figcaption></figure>"
    )


def image_task(suite: ImageTask) -> str:
    rows = []
    for i, (name, count, model, baseline) in enumerate(suite.scores, 1):
        total = ' class="total"' if i == len(suite.scores) else ""
        rows.append(
            f'<tr{total}><th scope="row">{escape(label(name))}</th>'
            + bar(model, count, f'<i class="random" style="left:{100 * baseline:.2f}%"></i>')
            + f"<td>{with_interval(model, count)}</td><td>{percent(baseline)}</td>"
            f"<td>{count:,}</td></tr>"
        )
    names = ("model", suite.baseline, "prompts")
    head = '<th scope="col">Category</th><th class="bar"></th>' + "".join(
        f'<th scope="col">{escape(n)}</th>' for n in names
    )
    return (
        f'<h3>{escape(label(suite.name))}</h3><p class="note">{escape(suite.note)}</p>'
        f'<div class="card"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}{scale(3)}</tbody></table></div></div>"
        f'<div class="pairs examples">{"".join(map(_example, suite.examples))}</div>'
    )


def _example(example: ImageTaskExample) -> str:
    outcome, mark = ("right", "✓") if example.correct else ("wrong", "✗")
    output = (
        ""
        if example.output_HWC is None
        else img(example.output_HWC, "output: " + example.instruction)
    )
    answer = f"<strong>{escape(example.answer)}</strong>" if example.answer else ""
    return (
        f'<figure class="pair"><div>'
        f"{img(example.image_HWC, 'reference: ' + example.instruction)}{output}</div><figcaption>"
        f'<span class="outcome {outcome}">{mark} {outcome}</span> '
        f'<span class="prompt">{escape(example.instruction)} {answer}</span>'
        f'<span class="reason">{escape(example.reason)}</span></figcaption></figure>'
    )


def stage(stage: Stage) -> str:
    note = f'<p class="note">{escape(stage.note)}</p>' if stage.note else ""
    curves = "".join(
        charts.line_chart(label(c.name), c.steps, c.values, c.held_out) for c in stage.curves
    )
    return f'<h3>{escape(label(stage.name))}</h3>{note}<div class="charts">{curves}</div>'


def reconstruction(pair: Reconstruction) -> str:
    original, got = (x.astype(np.float64) for x in (pair.original_HWC, pair.reconstruction_HWC))
    # float64 above: differences of uint8 would wrap around.
    error = np.mean((original - got) ** 2)
    psnr = f"{10 * math.log10(255**2 / error):.1f} dB" if error else "identical"
    return (
        f'<figure class="pair"><div>{img(pair.original_HWC, "original")}'
        f"{img(pair.reconstruction_HWC, 'reconstruction')}</div><figcaption>PSNR {psnr}"
        "</figcaption></figure>"
    )


def token_map(token_map: TokenMap) -> str:
    ids_HW = np.asarray(token_map.ids_HW)
    rows, columns = ids_HW.shape
    data = ",".join(map(str, ids_HW.ravel().tolist()))
    caption = (
        f'<span class="prompt">{escape(token_map.caption)}</span>' if token_map.caption else ""
    )
    alt = f"{rows} x {columns} token ids as colours"
    colours = f'<img class="pixels" src="{data_uri(charts.colours(ids_HW))}" alt="{alt}">'
    return (
        f'<figure class="pair tokens" data-columns="{columns}" data-ids="{data}">'
        f"<div>{img(token_map.image_HWC, token_map.caption or 'image')}{colours}</div><figcaption>"
        f"<output>{ids_HW.size} tokens, {len(np.unique(ids_HW))} different</output>{caption}"
        "</figcaption></figure>"
    )


def times(seconds: Mapping[str, float]) -> str:
    longest = max(seconds.values(), default=0) or 1
    return "".join(
        f'<tr><th scope="row">{escape(label(name))}</th><td class="bar"><span class="track plain">'
        f'<b style="width:{100 * value / longest:.2f}%"></b></span></td><td>{duration(value)}</td>'
        "</tr>"
        for name, value in seconds.items()
    )


def settings(name: str, value: Any) -> str:
    return f"<details><summary>{escape(label(name))}</summary>{table(_flatten(value))}</details>"


def _flatten(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
