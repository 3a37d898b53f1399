"""Score a run's images again."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.data.prompts import Prompt
from blip3o_jax.rl.log import RolloutLog, image_hash, image_path
from blip3o_jax.rl.rescore import print_table, rescore
from blip3o_jax.rl.reward_batch import RewardBatch
from blip3o_jax.train.metrics import read_rows
from tests.rl.redness import redness

RED = (RewardConfig(name="python:tests.rl.redness.redness"),)


@pytest.fixture
def run(tmp_path, rng):
    """Return a workdir with two rollouts of three images, of which two hosts have scored two and
    one, one of them without success."""
    images = rng.integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    for host, rows in ((0, [0, 2]), (1, [1])):
        log = RolloutLog(tmp_path, host, 0, 0, keep_images=True)
        for rollout in range(2):
            total = np.array([rollout + row / 10 for row in rows], np.float32)
            failed = np.array([rollout == 1 and row == 1 for row in rows])
            prompts = [Prompt("a red cat", {"prompt": "a red cat"})] * len(rows)
            log.write(
                rollout,
                rows,
                3 * rollout,
                prompts,
                images[rollout][rows],
                RewardBatch(total, failed, {}),
            )
        log.close()
    return tmp_path, images.reshape(6, 8, 8, 3).astype(float)


def test_every_image_is_scored_in_its_order(run, capsys):
    workdir, images = run
    mine = workdir / "mine.txt"
    mine.write_text("mine")
    (workdir / "out.jsonl").symlink_to(mine)  # as a directory from elsewhere may have it
    lines = rescore(workdir, RED, workdir / "out.jsonl", workers=1)
    assert mine.read_text() == "mine"
    assert lines == read_rows(workdir / "out.jsonl")
    assert [(line["rollout"], line["row"]) for line in lines] == [
        (i, j) for i in range(2) for j in range(3)
    ]
    want = redness(images, None, None)
    np.testing.assert_allclose([line["rescored"]["total"] for line in lines], want, rtol=1e-6)
    assert lines[2]["total"] == pytest.approx(0.2) and lines[4]["total"] is None
    print_table(lines, workdir / "out.jsonl")
    out = capsys.readouterr().out
    assert "1 of 6 images without one of the scores" in out and "correlation" in out
    assert f"{np.mean([line['rescored']['total'] for line in lines[:3]]):.4f}" in out
    print_table(lines[4:5], workdir / "out.jsonl")
    assert "none of 1 images has both scores" in capsys.readouterr().out


def test_what_a_reward_cannot_score_has_no_total(run):
    workdir, _ = run
    for path in workdir.glob("rollouts*.jsonl"):
        path.write_text(path.read_text().replace("a red cat", "pink"))
    reward = dataclasses.replace(RED[0], name="python:tests.rl.redness.redness_but_of_pink")
    assert {
        line["rescored"]["total"]
        for line in rescore(workdir, (reward,), workdir / "out.jsonl", workers=1)
    } == {None}


def test_images_that_are_not_there_or_others(run):
    workdir, _ = run
    path = image_path(workdir, 1, 2)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    with pytest.raises(
        UserError, match=r"00002.png is not the image of its line in rollouts.jsonl"
    ):
        rescore(workdir, RED, workdir / "out.jsonl", workers=1)
    image_path(workdir, 0, 0).unlink()
    with pytest.raises(
        UserError, match=r"00000.png cannot be read .* --config.rl.keep_images=true"
    ):
        rescore(workdir, RED, workdir / "out.jsonl", workers=1)
    with pytest.raises(UserError, match=r"holds no rollouts.jsonl with lines"):
        rescore(workdir / "rollouts", RED, workdir / "out.jsonl", workers=1)


LINE = {"rollout": 0, "row": 0, "prompt": "a", "metadata": {}, "total": 1.0, "image": "0" * 64}


@pytest.mark.parametrize(
    "change",
    [
        {"rollout": "../../etc"},
        {"row": -1},
        {"row": 1.5},
        {"rollout": True},
        {"rollout": 10**30},
        {"prompt": None},
        {"metadata": []},
        {"total": "1"},
        {"total": float("nan")},
        {"image": 3},
        "[1]",
        "{",
        '{"rollout": ' + "1" * 5000 + "}",
        "[" * 100_000,
    ],
    ids=lambda change: str(change)[:30],
)
def test_lines_that_no_log_writes(tmp_path, change):
    """Expect one line that names file and line, and no path made from the line's text."""
    log = tmp_path / "rollouts.jsonl"
    log.write_text(
        json.dumps(LINE | change) + "\n"
        if isinstance(change, dict)
        else f"{json.dumps(LINE)}\n{change}\n"
    )
    number = 1 if isinstance(change, dict) else 2
    with pytest.raises(
        UserError, match=rf"rollouts.jsonl:{number} is no line of a rollout: copy"
    ) as error:
        rescore(tmp_path, RED, tmp_path / "out.jsonl")
    assert "\n" not in str(error.value)


def test_a_line_ends_at_a_newline_alone(tmp_path):
    line = json.dumps(LINE | {"prompt": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "rollouts.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"00000.png cannot be read"):
        rescore(tmp_path, RED, tmp_path / "out.jsonl")


def test_images_that_are_no_png_of_a_rollout(tmp_path):
    log, image = tmp_path / "rollouts.jsonl", image_path(tmp_path, 0, 0)
    log.write_text(
        json.dumps(LINE) + "\n" + json.dumps(LINE)[:20]
    )  # a kill cut the last line short
    image.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(image, format="TIFF")
    with pytest.raises(UserError, match=r"00000.png cannot be read .*it is no PNG file"):
        rescore(tmp_path, RED, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"--out=\S+ must be a file in a directory that is there"):
        Image.new("RGB", (4, 4)).save(image)
        log.write_text(
            json.dumps(LINE | {"image": image_hash(np.zeros((4, 4, 3), np.uint8))}) + "\n"
        )
        rescore(tmp_path, RED, tmp_path)


def test_images_are_saved_only_where_asked(tmp_path, rng):
    log = RolloutLog(tmp_path, 0, 0, 0)
    image = rng.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    log.write(
        0, [0], 0, [Prompt("a")], image, RewardBatch(np.zeros(1, np.float32), np.zeros(1, bool), {})
    )
    log.close()
    assert (
        not (tmp_path / "rollouts").exists()
        and len(json.loads((tmp_path / "rollouts.jsonl").read_text())["image"]) == 64
    )
