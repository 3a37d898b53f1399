"""The loop on tiny runs: what is written; stopping, killing and resuming change nothing."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from blip3o_jax import config as config_lib
from blip3o_jax.config import UserError
from blip3o_jax.parallel import chips
from blip3o_jax.parallel.preemption import Preempted
from blip3o_jax.text.tokenizers import train_sentencepiece
from blip3o_jax.train import checkpoint, encode, initialize, loop, optimizer, recipe, supervised
from blip3o_jax.train.metrics import MetricLog, read_rows
from blip3o_jax.train.state import plan_state
from blip3o_jax.train.workdir import WorkdirLock
from tests import tiny
from tests.test_checksums import flip

STEPS = 6
# Rows hold times and memory too; these must be the same bit for bit.
EXACT = (
    "step",
    "train/loss",
    "train/ce",
    "train/flow",
    "train/accuracy",
    "train/grad_norm",
    "train/learning_rate",
    "data/bad_records",
    "train/skipped_steps",
)


def joint(**changes):
    groups = {"checkpoint": {"every": 2, "keep": 2}, "optimizer": {"ema_decay": 0.9}}
    return tiny.run_config(tiny.data(), steps=STEPS, preview=0, **groups | changes)


def tokenizer(**changes):
    return tiny.run_config(
        tiny.data(), stage="tokenizer", steps=STEPS, **{"checkpoint": {"every": 2}} | changes
    )


def test_nothing_is_read_ahead_before_the_step_is_made(monkeypatch):
    config, strategy = tokenizer(), tiny.strategy()
    method = supervised.Supervised()
    method.open(config)
    monkeypatch.setattr(supervised, "make_step", lambda *args: 1 / 0)
    monkeypatch.setattr(supervised, "DevicePrefetch", lambda *args: pytest.fail("reading began"))
    context = types.SimpleNamespace(
        config=config, strategy=strategy, vocabulary=None, plan=None, image_token_offset=None
    )
    with pytest.raises(ZeroDivisionError):
        method.begin(context, {}, None)


def rows(workdir):
    return [{name: row[name] for name in EXACT} for row in read_rows(workdir / "metrics.jsonl")]


def restored(workdir, step=None):
    """Return the whole state of a checkpoint, on one device."""
    root, latest = checkpoint.find(workdir)
    plan = plan_state(checkpoint.read_config(root), tiny.strategy())
    checkpoints = checkpoint.Checkpoints(root, 100)
    state, _ = checkpoints.restore(step or latest, plan)
    checkpoints.close()
    return state


def check_same(got, want):
    for (path, a), (_, b) in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


class Stopped(Exception):
    pass


def stop_after(monkeypatch, step):
    """End the run when it writes the row of `step`."""
    write = MetricLog.write

    def writing(self, at, values):
        write(self, at, values)
        if at == step:
            raise Stopped

    monkeypatch.setattr(MetricLog, "write", writing)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, supervised.train(joint(), workdir)


def test_a_run_writes_metrics_config_and_command(whole):
    workdir, summary = whole
    written = read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in written] == list(range(1, STEPS + 1))
    names = {
        "train/loss",
        "train/ce",
        "train/flow",
        "train/accuracy",
        "train/learning_rate",
        "perf/examples_per_s",
        "perf/tokens_per_s",
        "data/filled_slots",
        "data/filled_tokens",
        "perf/step_time_seconds",
        "perf/data_wait_fraction",
    }
    names |= {
        "train/grad_norm",
        "train/grad_norm/ar",
        "train/grad_norm/connector",
        "train/grad_norm/dit",
        "perf/host_memory_gib",
    }
    names |= {"train/bad_steps", "train/skipped_steps", "data/bad_records"}
    for row in written:
        assert names <= row.keys()
        assert all(np.isfinite(row[name]) for name in names)
        assert 0 <= row["perf/data_wait_fraction"] <= 1
        # Of the 32 tokens of a row some are padding.
        assert 0.5 < row["perf/tokens_per_s"] / (row["perf/examples_per_s"] * 32) < 1
        assert row["train/loss"] == pytest.approx(row["train/ce"] + row["train/flow"], rel=1e-6)
    assert written[-1]["train/loss"] < written[0]["train/loss"]
    assert (summary.step, summary.checkpoint) == (STEPS, workdir / "checkpoints")
    assert {"step": STEPS} | summary.metrics == written[-1]
    (path,) = (workdir / "tensorboard").glob("events*")
    data = path.read_bytes()
    assert b"config/text_summary" in data and b"command/text_summary" in data
    assert b"_hparams_/session_start_info" in data and b"optimizer.learning_rate" in data


def test_a_checkpoint_is_complete(whole):
    """Read weights, optimizer, position, configuration, tokenizer; the last two, and the best if
    it is another.
    """
    workdir, _ = whole
    root, step = checkpoint.find(workdir)
    assert step == STEPS
    kept = {int(p.name) for p in root.iterdir() if p.name.isdigit()}
    assert {4, 6} <= kept <= {2, 4, 6}
    cfg = checkpoint.read_config(root)
    assert cfg.model.ar.vocab_size == tiny.prepared()[0].model.ar.vocab_size
    assert list((root / "text").iterdir())
    meta = json.loads((root / "6" / "meta" / "metadata").read_text())
    assert meta["data"]["next_example"] == STEPS * 8
    assert int(restored(workdir)["step"]) == STEPS


def test_a_finished_run_is_not_run_again(whole, tmp_path, capsys):
    workdir, _ = whole
    before = (workdir / "metrics.jsonl").read_text()
    summary = supervised.train(joint(), workdir)
    assert "step 6 of 6 is done already" in capsys.readouterr().err
    longer = shutil.copytree(whole[0], tmp_path / "longer")
    supervised.train(dataclasses.replace(joint(), steps=4), longer)
    assert "checkpoints/6 is beyond steps=4, so nothing is trained" in capsys.readouterr().err
    assert (workdir / "metrics.jsonl").read_text() == before and summary.metrics == {}
    took = whole[1].seconds, whole[1].cpu_seconds
    assert (summary.seconds, summary.cpu_seconds) == took and min(took) > 0


def test_resumed_is_uninterrupted(whole, tmp_path, monkeypatch, capsys):
    """Stop at step 5 with a bit of the checkpoint of step 4 flipped, it goes on from that of step
    2: the same rows and the same state, bit for bit.
    """
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 5)
        supervised.train(joint(), tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 6))
    root = tmp_path / "checkpoints"
    flip(max((root / "4" / "state").rglob("d/*"), key=lambda path: path.stat().st_size), 1000)
    supervised.train(joint(), tmp_path)
    assert (
        "checkpoints/4 is damaged (state/" in (err := capsys.readouterr().err)
        and "going on from 2" in err
    )
    assert rows(tmp_path) == rows(whole[0])
    # Of both starts: those of the first up to the checkpoint.
    elapsed = [row["perf/elapsed_seconds"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert elapsed == sorted(elapsed)
    check_same(restored(tmp_path), restored(whole[0]))
    assert (root / "4.damaged").is_dir() and not (tmp_path / "lock.json").exists()


def test_resumed_with_muon_is_uninterrupted(tmp_path, monkeypatch):
    """Resume although its state has places without an array, which must come back as such."""
    muon = dataclasses.replace(
        tokenizer(), optimizer=dataclasses.replace(tokenizer().optimizer, name="muon")
    )
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 3)
        supervised.train(muon, tmp_path / "twice")
    for name in ("once", "twice"):
        supervised.train(muon, tmp_path / name)
    check_same(restored(tmp_path / "twice"), restored(tmp_path / "once"))


def test_resumed_with_other_settings_says_which(whole, tmp_path, capsys):
    before = (whole[0] / "checkpoints" / "config.json").read_text()
    supervised.train(joint(log_every=2), whole[0])
    assert (
        "resuming at step 6" in (err := capsys.readouterr().err) and "with log_every: 1 -> 2" in err
    )
    supervised.train(joint(), whole[0])
    assert (whole[0] / "checkpoints" / "config.json").read_text() == before


def tree(workdir):
    return {str(path): path.is_file() and path.read_bytes() for path in sorted(workdir.rglob("*"))}


def test_a_start_that_is_refused_changes_nothing(whole, tmp_path):
    """Leave what a kill left unfinished and a damaged step too."""
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    (workdir / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
    (workdir / "checkpoints" / "8").mkdir()
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7}\n')
    other = train_sentencepiece(tiny.CAPTIONS, tmp_path / "other.model", 300)
    shutil.copy(workdir / "text" / "tokenizer.model", tmp_path / "tokenizer.model")
    before = tree(workdir)
    for changes, message in (
        (
            {"rl": {"rewards": [{"name": "shapes"}], "prompts_file": "p"}},
            "rl.rewards is for blip3o rl",
        ),
        ({"stage": "tokenizer"}, "a run of 'joint' and cannot go on as one of 'tokenizer'"),
        ({"optimizer": {"ema_decay": 0.0}}, "does not fit this configuration"),
        ({"seed": 5}, "the data changed since the checkpoint"),
        ({"mesh": {"data": 3}}, "does not cover 8 devices"),
    ):
        with pytest.raises(UserError, match=message) as error:
            supervised.train(joint(**changes), workdir)
        assert "\n" not in str(error.value) and tree(workdir) == before, changes
    with WorkdirLock(workdir):
        held = tree(workdir)
        with pytest.raises(UserError, match=f"in use by another run .*pid {os.getpid()}"):
            supervised.train(joint(), workdir)
        assert tree(workdir) == held
    (workdir / "text" / "tokenizer.model").write_bytes(other.proto)
    before = tree(workdir)
    with pytest.raises(UserError, match=r"the text tokenizer .* is another than the one in"):
        supervised.train(joint(), workdir)
    assert tree(workdir) == before
    shutil.copy(tmp_path / "tokenizer.model", workdir / "text")
    supervised.train(joint(), workdir)  # done already
    assert (workdir / "checkpoints" / "8.damaged").is_dir() and len(
        read_rows(workdir / "metrics.jsonl")
    ) == STEPS


def test_a_start_that_is_refused_leaves_no_directory(tmp_path):
    """Refuse it after the vocabulary is trained."""
    with pytest.raises(UserError, match="none does not exist"):
        supervised.train(
            joint(checkpoint={"init_from": (("ar", str(tmp_path / "none")),)}),
            tmp_path / "runs" / "a",
        )
    assert not list(tmp_path.iterdir())


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests import conftest
import jax
from blip3o_jax import config as config_lib
from blip3o_jax.train import supervised
import json, pathlib
jax.config.update("jax_disable_most_optimizations", True)
if __name__ == "__main__":
    values = json.loads(pathlib.Path({config!r}).read_text())
    supervised.train(config_lib.from_dict(values), {workdir!r})
"""


def test_sigterm_saves_the_step_it_meets_and_the_run_goes_on_from_there(
    whole, tmp_path, monkeypatch
):
    """Send it while step 3, which is no checkpoint's, is in work."""
    before, write = signal.getsignal(signal.SIGTERM), MetricLog.write

    def writing(self, at, values):
        write(self, at, values)
        if at == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with (
        monkeypatch.context() as patch,
        pytest.raises(Preempted, match="joint: stopped by SIGTERM, step 3 of 6 is saved"),
    ):
        patch.setattr(MetricLog, "write", writing)
        supervised.train(joint(), tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.find(tmp_path)[1] == 3
    supervised.train(joint(), tmp_path)
    assert rows(tmp_path) == rows(whole[0])
    check_same(restored(tmp_path), restored(whole[0]))


def test_killed_and_run_again_is_uninterrupted(whole, tmp_path):
    """Send SIGKILL as soon as step 3 is written, wherever the run is then; the same command gives
    the same losses.
    """
    workdir, settings = tmp_path / "run", tmp_path / "config.json"
    settings.write_text(json.dumps(config_lib.to_dict(joint())))
    root = str(pathlib.Path(__file__).parent.parent.parent)
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(root=root, config=str(settings), workdir=str(workdir)))
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen([sys.executable, str(script)], stdout=log, stderr=log)
        deadline = time.monotonic() + 600
        while (
            run.poll() is None
            and len(read_rows(workdir / "metrics.jsonl")) < 3
            and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        assert run.poll() is None, (tmp_path / "log").read_text()
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    assert 3 <= len(read_rows(workdir / "metrics.jsonl")) < STEPS
    supervised.train(joint(), workdir)
    assert rows(workdir) == rows(whole[0])
    check_same(restored(workdir), restored(whole[0]))


def test_restored_onto_another_mesh(whole, tmp_path):
    """Write from eight devices, read by one and by two ways of sharding over eight: the same
    numbers.
    """
    root, _ = checkpoint.find(whole[0])
    want = checkpoint.restore_parts(root, tiny.strategy(), ("ar",), ema=False)
    for mesh in (("fsdp", 1, 8, 1), ("fsdp_tp", 2, 2, 2)):
        got = checkpoint.restore_parts(root, tiny.strategy(*mesh), ("ar",), ema=False)
        assert not got["ar"]["embedding"].sharding.is_fully_replicated
        check_same(got, want)
    check_same(want["ar"], restored(whole[0])["params"]["ar"])


def test_the_average_is_what_is_read_where_there_is_one(whole):
    root, _ = checkpoint.find(whole[0])
    state = restored(whole[0])
    parts = checkpoint.restore_parts(root, tiny.strategy())
    assert set(parts) == {"tokenizer", "ar", "connector", "dit", "vae"}
    check_same(parts["ar"], state["ema"]["ar"])
    check_same(parts["vae"], state["frozen"]["vae"])
    # A part of which some is trained and some frozen comes back whole.
    check_same(parts["dit"], checkpoint.merge_trees(state["ema"]["dit"], state["frozen"]["dit"]))
    with pytest.raises(
        UserError, match="holds no part text_tower: it was written by stage 'joint'"
    ):
        checkpoint.restore_parts(root, tiny.strategy(), ("text_tower",))


def test_find(whole, tmp_path):
    workdir, _ = whole
    root = workdir / "checkpoints"
    assert checkpoint.find(workdir) == checkpoint.find(root) == (root, 6)
    assert checkpoint.find(root / "4") == (root, 4)
    for path, message in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path, "is not a checkpoint"),
        (root / "text", "is not a checkpoint"),
        (root / "4" / "state", "is not a checkpoint"),
        (workdir / "metrics.jsonl", "is not a checkpoint"),
    ):
        with pytest.raises(UserError, match=message) as error:
            checkpoint.find(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_config_that_was_edited_is_named(whole, tmp_path):
    root = shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    values = json.loads((root / "config.json").read_text())
    del values["crc32c"]
    values["model"]["ar"]["num_hidden_layers"] += 1
    (root / "config.json").write_text(json.dumps(values))
    shapes = r"ar/\S+ is of shape \(.*\) in it, of shape \(.*\) by the configuration"
    with pytest.raises(
        UserError, match=rf"checkpoints/config.json does not fit \S+/6 \({shapes}\): put back"
    ) as error:
        checkpoint.restore_parts(root, tiny.strategy(), ("ar",))
    assert "\n" not in str(error.value)
    plan = plan_state(checkpoint.read_config(root), tiny.strategy())
    with pytest.raises(UserError, match=rf"/6 does not fit this configuration \({shapes}\); use"):
        checkpoint.Checkpoints(root, keep=2).restore(6, plan)


def test_cached_encoders_give_the_same_losses_and_run_once(whole, tmp_path, monkeypatch, capsys):
    """Require equal codes: those from disk are the online run's, so that the first cross entropy is
    the same bit for bit. Latents are float32 and come from another program than the step's: they
    and what is trained on them agree to a few units in the last place.
    """
    cached = joint(data={"cache_dir": str(tmp_path / "cache")})
    supervised.train(cached, tmp_path / "first")
    got, want = rows(tmp_path / "first"), rows(whole[0])
    assert "16/16 records" in capsys.readouterr().err
    assert got[0]["train/ce"] == want[0]["train/ce"]
    assert [row["train/loss"] for row in got] == pytest.approx(
        [row["train/loss"] for row in want], rel=2e-6
    )
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.npy")}
    assert len(written) == 2
    # Another run over the same data with the same encoders finds them, and is the same bit for bit.
    monkeypatch.setattr(encode, "_write_shard", lambda *_: pytest.fail("encoded again"))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 2)
        supervised.train(cached, tmp_path / "second")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.npy")} == written
    assert rows(tmp_path / "second") == got[:2]


def test_the_cache_is_for_frozen_encoders(tmp_path):
    cfg = joint(data={"cache_dir": str(tmp_path / "cache")}, trainable=("ar/.*", "vae/decoder/.*"))
    plan = plan_state(cfg, tiny.strategy())
    with pytest.raises(
        UserError, match=r"keeps the outputs of frozen encoders, but vae is trained"
    ):
        supervised._encode_sources(cfg, plan, tiny.strategy(), plan.abstract, [])


def test_unreadable_records_are_counted(tmp_path, monkeypatch):
    tiny.write_data(tmp_path / "images")
    (tmp_path / "images" / "002.png").write_bytes(b"")
    data = {"path": str(tmp_path / "images"), "max_bad_fraction": 0.5}
    with pytest.raises(Stopped):
        stop_after(monkeypatch, 3)
        supervised.train(tokenizer(data=data), tmp_path / "run")
    counts = [row["data/bad_records"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert (
        counts == sorted(counts) and counts[-1] >= 1
    )  # 16 records, 24 examples: met at least once


def test_a_run_that_is_not_finite_stops_and_leaves_its_checkpoint(tmp_path, monkeypatch):
    """Train at a rate of 1e30, past what settings may be, step 3 is the first that is not finite
    (the warm-up starts from 0); two of those are too many.
    """
    cfg = tokenizer(optimizer={"clip_norm": 0.0}, max_nonfinite=2)
    schedule = optimizer.learning_rate(cfg.optimizer, cfg.steps)
    monkeypatch.setattr(
        optimizer, "learning_rate", lambda cfg, steps: lambda step: 1e33 * schedule(step)
    )
    with pytest.raises(
        UserError,
        match=r"tokenizer: loss, gradient or the parameters after it were not finite "
        r"in 2 steps in a row, up to step 4",
    ) as error:
        supervised.train(cfg, tmp_path)
    assert "\n" not in str(
        error.value
    ) and "none of these was applied, and the last step saved is 2: " in str(error.value)
    assert [row["train/skipped_steps"] for row in read_rows(tmp_path / "metrics.jsonl")] == [
        0,
        0,
        1,
    ]
    state = restored(tmp_path)
    assert int(state["step"]) == 2
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state["params"]))


def test_the_last_and_the_best_are_kept(tmp_path):
    state = {"params": {"w": np.arange(3.0)}, "step": np.int32(0)}
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    for step, loss in enumerate([5.0, 1.0, 3.0, float("inf"), 2.0], 1):
        checkpoints.save(step, state, {"next_example": step}, loss)
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "4", "5"]


def test_mfu_is_reported_where_the_peak_is_known(whole, tmp_path, monkeypatch):
    slow = dataclasses.replace(chips.CHIPS["v4"], flops=1e12)
    monkeypatch.setitem(chips.BY_KIND, jax.devices()[0].device_kind, slow)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 2)
        supervised.train(joint(), tmp_path)
    row = read_rows(tmp_path / "metrics.jsonl")[1]
    # Three times the decoder's two FLOPs for each token and weight, and what the other parts cost.
    per_step = row["perf/mfu"] * 8e12 * 8 / row["perf/examples_per_s"]
    assert row["perf/tflops_per_device"] == pytest.approx(row["perf/mfu"])  # of 1 TFLOP/s
    assert 0 < row["perf/useful_mfu"] < row["perf/mfu"]
    ar = tiny.prepared()[0].model.ar
    weights = 2 * (32 * (2 * 32 + 2 * 16) + 3 * 32 * 64) + 32 * ar.padded_vocab_size
    assert 1 < per_step / (6 * weights * 8 * 32) < 4
    assert "perf/mfu" not in read_rows(whole[0] / "metrics.jsonl")[1]


def test_a_recipe_hands_parts_on(whole, tmp_path):
    handed = joint(checkpoint={"every": 2, "keep": 2, "init_from": (("tokenizer", "tokenizer"),)})
    summaries = recipe.run({"tokenizer": tokenizer(), "joint": handed}, tmp_path)
    assert {name: summary.step for name, summary in summaries.items()} == {
        "tokenizer": STEPS,
        "joint": STEPS,
    }
    assert checkpoint.find(tmp_path) == (tmp_path / "joint" / "checkpoints", STEPS)
    got = checkpoint.restore_parts(tmp_path, tiny.strategy(), ("tokenizer",))
    check_same(got, checkpoint.restore_parts(tmp_path / "tokenizer", tiny.strategy()))
    initial = checkpoint.restore_parts(
        whole[0], tiny.strategy(), ("tokenizer",)
    )  # of the same seed, never trained
    assert any(
        np.any(np.asarray(a) != b)
        for a, b in zip(*map(jax.tree.leaves, (got, initial)), strict=True)
    )
    # The other parts start as they would have without.
    check_same(
        *(
            checkpoint.restore_parts(path, tiny.strategy(), ("vae",))
            for path in (tmp_path, whole[0])
        )
    )


def test_parts_of_another_model_are_refused(whole, tmp_path):
    init_from = {"init_from": (("connector", str(whole[0])), ("tokenizer", str(whole[0])))}
    for changes, message in (
        (
            {"model": {"tokenizer": {"bottleneck_dim": 16}}},
            r"tokenizer\['bottleneck'\].* has shape \(.*\), this model's \(",
        ),
        (
            {"model": {"dit": {"caption_channels": 32}}},
            r"connector\['linear1'\]\['bias'\] of .* has shape \(16,\), this model's \(32,\)",
        ),
    ):
        cfg = joint(checkpoint=init_from, **changes)
        plan = plan_state(cfg, tiny.strategy())
        with pytest.raises(UserError, match=f"checkpoint.init_from: {message}") as error:
            for part, path in cfg.checkpoint.init_from:
                initialize.match_to_plan(
                    plan, part, checkpoint.restore_parts(path, tiny.strategy(), (part,))[part], path
                )
        assert "\n" not in str(error.value)


def test_a_recipe_names_a_source_that_is_not_there(tmp_path):
    stages = {"joint": joint(checkpoint={"init_from": (("vae", "autoencoder"),)})}
    with pytest.raises(
        UserError, match="vae comes from autoencoder, which is no directory and no earlier stage"
    ):
        recipe.run(stages, tmp_path)


def test_a_recipe_and_a_single_run_in_one_place(tmp_path):
    stages = {"tokenizer": tokenizer(), "joint": joint()}
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="/checkpoints is of a single run: start a recipe in"):
        recipe.run(stages, tmp_path)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "recipe.json").write_text('{"stages": [')
    with pytest.raises(UserError, match=r"recipe.json cannot be read as JSON .*, or remove it:"):
        recipe.run(stages, tmp_path)
    with pytest.raises(UserError, match=r"recipe.json says that this --workdir holds the stages"):
        recipe.run({"": joint()}, tmp_path)
    assert (tmp_path / "recipe.json").read_text() == '{"stages": ['


def test_errors_come_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "plan_state", lambda *_: pytest.fail("too late"))
    for changes, message in (
        ({"data": {"path": ""}}, "data.path is empty"),
        ({"data": {"path": str(tmp_path / "none")}}, "no such file or directory"),
        ({"data": {"batch_size": 12}}, "data.batch_size=12 does not divide over 8 batch shards"),
        ({"mesh": {"data": 3}}, "does not cover 8 devices"),
        ({"mesh": {"strategy": "fdsp"}}, "mesh.strategy='fdsp' is not one of"),
    ):
        with pytest.raises(UserError, match=message) as error:
            supervised.train(joint(**changes), tmp_path / "run")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_everything_is_on_disk_before_a_step_is_saved():
    """Check the order: a run that resumes from a saved step does not write that step's rows and
    lines again.
    """
    called = []
    note = lambda name, result=None: lambda *_: called.append(name) or result
    cfg = tiny.run_config(tiny.data(), steps=1, preview=0)
    batches = types.SimpleNamespace(
        next=lambda state: {},
        position=lambda: {},
        host_metrics=dict,
        check=note("check"),
        sync=note("batches"),
        wait_seconds=0.0,
    )
    metrics = {"loss": np.float32(1), "bad_steps": 0}
    run = loop._Run(
        types.SimpleNamespace(config=cfg, start=0),
        loop.TrainerSpec(batches, lambda state, batch: (state, metrics)),
        types.SimpleNamespace(check=lambda: None, save=note("save")),
        types.SimpleNamespace(check=lambda: None),
        types.SimpleNamespace(
            write=note("write"), sync=note("log"), once=lambda *_: contextlib.nullcontext()
        ),
        types.SimpleNamespace(before_step=lambda *_: None, after_step=lambda *_: None),
        types.SimpleNamespace(due=lambda step: False),
        types.SimpleNamespace(enter=lambda *_: None),
        loop.ElapsedTime(),
    )
    run.steps({})
    assert called == ["check", "write", "log", "batches", "save"]
