"""Train on pictures of one's own from end to end, and sample the held-out captions."""

import dataclasses
import errno
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from blip3o_jax import cli
from blip3o_jax.config import DataConfig, UserError
from blip3o_jax.data.record import BadRecord
from blip3o_jax.demo import held_out
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 210)}


def write_pictures(folder: pathlib.Path) -> pathlib.Path:
    """Write 240 pictures of 32 px: a square of a colour at one of many places and sizes."""
    folder.mkdir()
    lines = []
    for i in range(240):
        colour = list(COLOURS)[i % 3]
        side, x, y = 8 + i % 5 * 2, i % 12, i // 12
        picture = np.full((32, 32, 3), 255, np.uint8)
        picture[y : y + side, x : x + side] = COLOURS[colour]
        Image.fromarray(picture).save(folder / f"{i}.png")
        caption = f"a {colour} square of {side} at {x} and {y}"
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_held_out_samples_are_compared_with_the_nearest_training_picture(tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures")
    config = f"--config={ROOT}/configs/own.py:{folder}"
    assert cli.main(["demo", config, f"--workdir={tmp_path}/run", "--fast"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["held_out_captions"] >= 20 and 0 <= summary["matched"] <= 1
    saved = json.loads((tmp_path / "run/report.json").read_text())
    lines = (folder / "captions.jsonl").read_text().splitlines()
    captions = [json.loads(line)["caption"] for line in lines]
    shown = saved["held_out"]["comparisons"]
    held = {entry["caption"] for entry in shown}
    assert held <= set(captions) and not held & {entry["nearest_caption"] for entry in shown}
    curves = {
        stage["name"]: {c["name"] for c in stage["curves"] if c["held_out"]}
        for stage in saved["stages"]
    }
    assert {"ce", "flow"} <= curves["joint"]
    assert (tmp_path / "run/held_out/grid.png").exists()


def test_a_recipe_without_held_out_captions_is_refused(tmp_path):
    stages = {"joint": tiny.run_config(tiny.data())}
    with pytest.raises(UserError, match=r"data\.held_out"):
        held_out.run(stages, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_stage_trains_on_captions_that_the_last_one_holds_out(tmp_path):
    config = tiny.run_config(tiny.data())
    joint = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=0.2))
    first = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=0.1))
    with pytest.raises(UserError, match=r"held_out is 0.1 in the stage first and 0.2 in joint"):
        held_out.run({"first": first, "joint": joint}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    held_out._check_held_out({"first": joint, "joint": first})  # a larger fraction holds out more


def test_an_error_of_the_disk_is_no_record_to_leave_out(monkeypatch):
    def fail(source, index, use):
        raise BadRecord("a.tar", "0", "cannot be read") from OSError(errno.EIO, "broken", "a.tar")

    monkeypatch.setattr(held_out, "read_record", fail)
    with pytest.raises(OSError, match="broken"):
        list(held_out._pictures([(range(3), 1.0)], DataConfig(), (32, 32)))
