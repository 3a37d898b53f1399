"""Run the worked examples of docs/how_to/ from the pages as they stand: files are written, edits
are made to a copy of the package, and `blip3o train` trains the result."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from blip3o_jax import pipeline as pipelines
from blip3o_jax.evaluation import registry
from tests import conftest, tiny
from tests.docs.pages import ROOT, titled

HOW_TO = ROOT / "docs" / "how_to"


def edited(text: str, diff: str) -> str:
    """Return `text` after a diff whose hunks, parted by @@, are found by their lines alone."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"not once in the file:\n{old}"
        text = text.replace(old, new)
    return text


def follow(page: str, root: pathlib.Path) -> None:
    """Do what a page says in the tree at `root`: write its files, make its edits."""
    for title, text in titled(HOW_TO / page).items():
        path = root / title
        path.parent.mkdir(parents=True, exist_ok=True)
        is_edit = path.exists()
        path.write_text(edited(path.read_text("utf-8"), text) if is_edit else text, "utf-8")


def test_pasted_code_passes_the_checks_of_the_project(tmp_path):
    """Follow every page in a copy of the files that the pages edit, and lint what was written."""
    pages = sorted(page.name for page in HOW_TO.glob("*.md"))
    blocks = {page: titled(HOW_TO / page) for page in pages}
    paths = {path for titles in blocks.values() for path in titles if path.endswith(".py")}
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path in paths:
        if (ROOT / path).exists():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, tmp_path / path)
    for page in pages:
        follow(page, tmp_path)
    assert len(paths) > 5
    for command in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", *sorted(paths)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_part_a_stage_and_a_strategy_are_added_and_trained(tmp_path):
    """Run on four devices, on which the strategy of the page shards an axis."""
    shutil.copytree(ROOT / "blip3o_jax", tmp_path / "blip3o_jax")
    for page in ("add_a_part.md", "add_a_stage.md", "add_a_strategy.md"):
        follow(page, tmp_path)
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "JAX_COMPILATION_CACHE_DIR": str(conftest.CACHE),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [
        *(sys.executable, "-m", "blip3o_jax", "train", "--config=configs/colour.py"),
        *("--workdir=run", f"--config.data.path={tiny.data()}", "--config.steps=3"),
        *("--config.log_every=1", "--config.preview=0", "--config.mesh.cpu_devices=4"),
        *("--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.strategy=fsdp_mlp"),
        *("--config.data.batch_size=8", "--config.model.tokenizer.encoder.num_hidden_layers=2"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 3 and np.isfinite(losses).all() and losses[2] < losses[0]
    assert {"train/grad_norm/colour_probe", "train/largest_error"} <= set(rows[0]), rows[0]


def test_the_strategy_cuts_what_the_page_says():
    text = (ROOT / "blip3o_jax/parallel/rules.py").read_text("utf-8")
    text = edited(text, titled(HOW_TO / "add_a_strategy.md")["blip3o_jax/parallel/rules.py"])
    rules = types.ModuleType("rules_of_the_page")
    sys.modules[rules.__name__] = rules
    exec(compile(text, "rules.py", "exec"), rules.__dict__)
    strategy = rules.Strategy("fsdp_mlp", tiny.strategy("fsdp", fsdp=4).mesh)
    assert tuple(strategy.spec("ar", ("embed", "mlp"), (32, 64))) == (None, "fsdp")
    assert tuple(strategy.spec("ar", ("embed", "heads", None), (32, 4, 8))) == (None, None, None)
    assert tuple(strategy.spec("vae", ("embed", "mlp"), (32, 64))) == (None, None)


def test_a_reward_is_a_term_of_a_run_and_a_suite(tmp_path, monkeypatch):
    follow("add_a_reward.md", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # scoring processes take it over
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "grey"}\n{"prompt": "colourful"}\n')
    suite = registry.find_suite(
        "python:my_rewards.colourful,scale=50", tmp_path / "prompts.jsonl", images_per_prompt=1
    )
    images_BHWC = np.full((2, 8, 8, 3), 128, np.uint8)
    images_BHWC[1, :, :4], images_BHWC[1, :, 4:] = (255, 0, 0), (0, 0, 255)
    found = suite.score_outputs(images_BHWC, suite.prompts(None, 0))
    assert found.correct == [False, True]
    # Halves of red and blue: rg 255, 0 and yb 127.5, -255, so deviations and means of 127.5, 191.25
    # and 127.5, -63.75.
    deviation, mean = np.hypot(127.5, 191.25), np.hypot(127.5, 63.75)
    assert found.means["score"] == pytest.approx((deviation + 0.3 * mean) / 50 / 2, rel=1e-5)


class Painter:
    """Replace a model: paint all prompts except the first in the colour that they name."""

    config = types.SimpleNamespace(model=types.SimpleNamespace(image_size=8))

    def __init__(self, colours):
        self.colours = colours

    def __getattr__(self, name):
        """Return the sampling method under any name."""
        return self.sample

    def sample(self, requests, **_):
        colours = [self.colours[request.text.removeprefix("all ")] for request in requests]
        colours[0] = (255, 255, 255)
        images_BHWC = np.ones((len(requests), 8, 8, 1)) * np.array(colours)[:, None, None, :]
        prompts = [request.text for request in requests]
        return pipelines.Generated(prompts, images_BHWC.astype(np.uint8), None)


def test_a_suite_scores_a_model(tmp_path, monkeypatch, capsys):
    follow("add_a_suite.md", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import plain_colours

    monkeypatch.setattr("blip3o_jax.load", lambda path: Painter(plain_colours.COLOURS))
    exec((tmp_path / "evaluate_plain_colours.py").read_text("utf-8"), {})
    scores = json.loads((tmp_path / "scores/scores.json").read_text("utf-8"))
    assert scores["prompts"] == 12 and float(capsys.readouterr().out) == scores["overall"]
    outcomes = json.loads((tmp_path / "scores/results.json").read_text("utf-8"))
    assert [entry["correct"] for entry in outcomes][1:] == [True] * 11
    assert scores["baselines"]["images_of_other_prompts"]["overall"] < scores["overall"]
