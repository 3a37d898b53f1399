"""metrics.jsonl and TensorBoard's events: what a kill, a damaged file and a full disk leave."""

import json
import pathlib

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c

from blip3o_jax import files
from blip3o_jax.train.metrics import MetricLog, read_rows


def log(directory, start=0):
    return MetricLog(directory, start, 9, "test")


def written(directory, *steps, start=0, value=1.0):
    metrics = log(directory, start)
    for step in steps:
        metrics.write(step, {"loss": value * step})
    metrics.close()


def events(path):
    """Return the events of a file, whose checksums must be right."""
    data, found = path.read_bytes(), []
    while data:
        size, check = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:12], "little")
        assert masked_crc32c(data[:8]) == check
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def test_the_configuration_and_the_command_are_text_and_hyperparameters(tmp_path):
    metrics = log(tmp_path)
    metrics.describe({"steps": 3, "optimizer": {"name": "muon"}, "trainable": ["ar/.*"]}, "a --b")
    metrics.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    config, command, experiment, session = (
        event.summary.value[0] for event in events(path) if event.summary.value
    )
    assert (config.tag, command.tag) == ("config/text_summary", "command/text_summary")
    assert b'        "name": "muon"' in config.tensor.string_val[0]
    assert command.tensor.string_val == [b"    a --b"]
    tags = [info.name.tag for info in content(experiment).experiment.metric_infos]
    assert tags == ["train/loss", "rl/reward"]
    hparams = content(session).session_start_info.hparams
    assert hparams["steps"].number_value == 3 and hparams["optimizer.name"].string_value == "muon"
    assert hparams["trainable"].string_value == '["ar/.*"]'


def content(value):
    return HParamsPluginData.FromString(value.metadata.plugin_data.content)


def test_rows_past_the_checkpoint_are_written_again(tmp_path):
    written(tmp_path, 1, 2, 3)
    written(tmp_path, 3, 4, start=2, value=10.0)
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 30),
        (4, 40),
    ]


def test_events_hold_scalars_images_and_where_the_run_started(tmp_path):
    metrics = log(tmp_path, start=4)
    metrics.write(5, {"loss": 0.5, "grad_norm/ar": 2.0})
    metrics.images(5, "preview", np.zeros((2, 4, 6, 3), np.uint8))
    metrics.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    version, start, scalars, images = events(path)
    assert version.file_version == "brain.Event:2" and (start.step, start.session_log.status) == (
        5,
        1,
    )
    assert scalars.step == images.step == 5
    assert {value.tag: value.simple_value for value in scalars.summary.value} == {
        "loss": 0.5,
        "grad_norm/ar": 2.0,
    }
    (image,) = images.summary.value
    assert (image.tag, image.image.height, image.image.width) == ("preview", 4, 12)


def test_broken_lines_cost_no_other_rows(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1}',
        b'{"step": 2, "lo{"step": 3}',
        b'{"step": 3}',
        b"[4]",
        b'{"loss": 1}',
        b"\0\0\xff",
        b'{"step": 4}',
    ]
    lines += [
        b'{"step": 3, "again": 1}',
        b'{"step": ' + b"9" * 5000 + b"}",
        b"[" * 10**5,
        b'{"step": 5, "cut',
    ]
    path.write_bytes(b"\n".join(lines))
    assert [row["step"] for row in read_rows(path, "step")] == [1, 3, 4, 3]
    assert caplog.messages == [
        f"{path}: left out 6 lines (4 no JSON, 2 no object with step): 2, 4, 5, 6, 9, ..."
    ]
    written(tmp_path, 5, start=4)
    assert [(row["step"], row.get("again")) for row in read_rows(path, "step")] == [
        (1, None),
        (3, 1),
        (4, None),
        (5, None),
    ]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"\n".join(lines)
    assert (
        caplog.messages[1].endswith("the file as it was is metrics.jsonl.damaged")
        and len(caplog.messages) == 2
    )


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_a_kill_while_it_is_opened_loses_no_row(tmp_path, monkeypatch, moment):
    written(tmp_path, 1, 2, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*unused):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        *((files.os, "fsync") if moment == "write" else (pathlib.Path, "replace")), killed
    )
    with pytest.raises(KeyboardInterrupt):
        log(tmp_path, start=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_opening_a_sound_file_does_not_write_it(tmp_path):
    written(tmp_path, 1, 2)
    before = (tmp_path / "metrics.jsonl").stat()
    log(tmp_path, start=2).close()
    after = (tmp_path / "metrics.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("where", ["_rows", "_events"])
def test_a_full_disk_raises_where_it_is_written_to(tmp_path, where):
    """Write to /dev/full, which takes no byte."""
    metrics = log(tmp_path)
    with open("/dev/full", "wb" if where == "_events" else "w") as full:
        if where == "_rows":
            metrics._rows._file = full
        else:
            metrics._events._records._writer = full
        with pytest.raises(OSError, match="No space left") as error:
            metrics.write(1, {"loss": 1.0})
            metrics.sync()
        assert pathlib.Path(error.value.filename).parent in (tmp_path, tmp_path / "tensorboard")
        with pytest.raises(OSError, match="No space left"):
            full.close()


def test_numbers_that_json_has_not(tmp_path):
    metrics = log(tmp_path)
    metrics.write(1, {"loss": float("nan"), "ce": float("inf")})
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": "nan",
        "ce": "inf",
    }
