"""Files of prompts, for sampling, evaluation and reinforcement learning.

A file holds JSON lines with "prompt" or "caption" and whatever a scorer reads, as the shapes data set's prompts_*.jsonl and
GenEval's evaluation_metadata.jsonl do, or plain text, one prompt a line. Empty lines are skipped.
"""

import dataclasses
import json
import pathlib
from typing import Any

from blip3o_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`metadata`: its whole line, for the rewards. `category`: "category" or "tag" of that, or ""."""

    text: str
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    category: str = ""


def read_prompts(path: str | pathlib.Path) -> list[Prompt]:
    """All prompts of a file, as JSON lines where its first line is one. UserError, with file and line, for what is none."""
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # a mark of byte order would hide the first line's brace
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from e
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from e
    # Not splitlines: JSON's texts may hold U+2028 and its like as they are.
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path} holds no prompt: write one a line")
    if not numbered[0][1].startswith("{"):
        return [Prompt(line) for _, line in numbered]
    return [_parsed(line, f"{path}:{number}") for number, line in numbered]


def _parsed(line: str, where: str) -> Prompt:
    try:
        metadata = json.loads(line)
    except ValueError as e:
        raise UserError(f"{where} is no JSON: {e}") from e
    text = (metadata.get("prompt") or metadata.get("caption")) if isinstance(metadata, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where} has no text under "prompt" or "caption"')
    return Prompt(text.strip(), metadata, str(metadata.get("category") or metadata.get("tag") or ""))
