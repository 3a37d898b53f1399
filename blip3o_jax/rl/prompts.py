"""The prompts of a run: read from a file, and drawn in an order that depends on nothing but the seed.

A file holds JSON lines with "prompt" or "caption" and whatever the rewards read, as the shapes data set's prompts_*.jsonl and
GenEval's evaluation_metadata.jsonl do, or plain text, one prompt a line. Empty lines are skipped.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

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
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"rl.prompts_file={path} cannot be read: {e}") from e
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"rl.prompts_file={path} holds no prompt: write one a line")
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


def prompt_indices(count: int, rollout: int, prompts_per_rollout: int, seed: int) -> np.ndarray:
    """Which of `count` prompts rollout number `rollout` draws, int64 [prompts_per_rollout]: the next piece of an endless row
    of all prompts in a random order, then all in another, and so on. Nothing need be kept to go on with it."""
    positions = rollout * prompts_per_rollout + np.arange(prompts_per_rollout)
    epochs, places = np.divmod(positions, count)
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in np.unique(epochs).tolist()}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)])
