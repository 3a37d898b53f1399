"""Write the report of a run: one HTML file that contains its style, script and images, and the JSON
that it shows.

`report_contents.Results` holds the contents of a report; `write_report` writes it.
"""

import dataclasses
import json
import math
import pathlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax import files
from blip3o_jax.evaluation import report_sections as sections
from blip3o_jax.evaluation.report_contents import Results
from blip3o_jax.evaluation.report_html import data_uri, escape, table


def write_report(results: Results, out_html: pathlib.Path) -> None:
    """Write `out_html`, and a file of the same name with .json."""
    out_html = pathlib.Path(out_html)
    text = pathlib.Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    # Template, not str.format: the style and the script of the page are full of braces.
    page = string.Template(_with_sections(text, results)).substitute(
        title=escape(results.title),
        subtitle=escape(results.subtitle),
        headline=sections.headline(results),
        image_tasks="".join(map(sections.image_task, results.image_tasks)),
        stages="".join(map(sections.stage, results.stages)),
        reconstructions="".join(map(sections.reconstruction, results.reconstructions)),
        token_maps="".join(map(sections.token_map, results.token_maps)),
        times=sections.times(results.seconds),
        configuration="".join(
            sections.settings(name, value) for name, value in results.configuration.items()
        ),
        versions=table(results.versions.items()),
        **(sections.scored_sections(results.scored) if results.scored else {}),
        **(sections.held_out_section(results.held_out) if results.held_out else {}),
    )
    files.replace_text(out_html, page)
    files.replace_text(
        # NaN is no JSON: parsers of browsers refuse the whole file.
        out_html.with_suffix(".json"),
        json.dumps(to_json(results), indent=1, allow_nan=False),
    )


def _with_sections(text: str, results: Results) -> str:
    """Return the template without the sections `<!-- if NAME -->` ... `<!-- end NAME -->` of what
    `results` does not have."""
    for name in ("scored", "image_tasks", "held_out"):
        if not getattr(results, name):
            text = re.sub(rf"<!-- if {name} -->.*?<!-- end {name} -->\n", "", text, flags=re.S)
    return text


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
