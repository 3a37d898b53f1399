"""What a checkpoint's readers do with files that are not those that were written."""

import os
import random
import re
import shutil
import types

import jax
import numpy as np
import pytest

from blip3o_jax import checksums
from blip3o_jax.config import UserError
from blip3o_jax.convert.stored_weights import StoredWeights
from blip3o_jax.text.tokenizers import load_tokenizer, train_sentencepiece
from blip3o_jax.train import checkpoint, checkpoint_steps
from blip3o_jax.train.checkpoint import Checkpoints
from blip3o_jax.train.state import plan_state
from tests import tiny
from tests.test_checksums import flip
from tests.train.test_loop import check_same

STATE = {"params": {"w": np.arange(64.0), "b": np.ones((3, 5), np.float32)}, "step": np.int32(2)}


def abstract():
    at = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), STATE)
    return types.SimpleNamespace(abstract=shapes)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a checkpoint directory with steps 2 and 4, of a state that no model has."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    tokenizer = train_sentencepiece(tiny.CAPTIONS, root.parent / "t.model", 320)
    checkpoints = Checkpoints(root, keep=2)
    checkpoints.open(tiny.run_config(), tokenizer)
    for step in (2, 4):
        state = jax.tree.map(lambda x, step=step: x * np.asarray(step, x.dtype), STATE)
        checkpoints.save(step, state, {"next_example": step}, 1.0)
    checkpoints.close()
    return root


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def data_file(step):
    """Return the largest of the files that hold a step's arrays."""
    return max(
        (path for path in (step / "state").rglob("d/*")), key=lambda path: path.stat().st_size
    )


def no_data(root):
    for file in (root / "4" / "state").rglob("d/*"):
        file.unlink()


def listing_nothing(step):
    checksums.write_json(step / "manifest.json", {"files": {}, "step": int(step.name)})


BROKEN = {
    "an empty directory": (lambda root: (root / "6").mkdir(), "6", "manifest.json is missing"),
    "no meta": (
        lambda root: shutil.rmtree(root / "4" / "meta"),
        "4",
        "meta/commit_success.txt is missing",
    ),
    "no arrays": (no_data, "4", r"state/d/\w+ is missing"),
    "nothing listed": (
        lambda root: listing_nothing(root / "4"),
        "4",
        "manifest.json does not list state/manifest.ocdbt",
    ),
    "a file too many": (
        lambda root: (root / "4" / "state" / "x").touch(),
        "4",
        "state/x is not listed in manifest.json",
    ),
    "a renamed step": (
        lambda root: shutil.copytree(root / "4", root / "6"),
        "6",
        "manifest.json has step 4, not 6",
    ),
    "a file in its place": (lambda root: (root / "6").touch(), "6", "it is no directory"),
    "a dangling link": (lambda root: (root / "6").symlink_to("gone"), "6", "it is no directory"),
    "a flipped bit": (
        lambda root: flip(data_file(root / "4"), 1000),
        "4",
        r"state/\S+ has CRC32C \w{8}, not \w{8}",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_step(root, capsys, case):
    """Check that a resume falls back to the step before, says so and sets it aside; whoever shows
    weights refuses, naming the next.
    """
    spoil, step, reason = BROKEN[case]
    intact = "4" if step == "6" else "2"
    spoil(root)
    found, newest = checkpoint.find(root)
    assert newest == int(step)
    with pytest.raises(
        UserError,
        match=rf"checkpoints/{step} is damaged \({reason}\): "
        rf".*checkpoints/{intact} is the newest step that is intact",
    ) as error:
        checkpoint_steps.check_intact(found, newest)
    assert "\n" not in str(error.value)

    before = tree(root)
    checkpoints = Checkpoints(root, keep=2)
    assert checkpoints.newest_intact() == int(intact)
    state, position = checkpoints.restore(int(intact), abstract())
    check_same(state, jax.tree.map(lambda x: x * np.asarray(int(intact), x.dtype), STATE))
    assert position == {"next_example": int(intact)}
    assert tree(root) == before, "reading changes nothing"
    checkpoints.open(tiny.run_config(), None)
    checkpoints.save(8, STATE, {"next_example": 8}, 1.0)
    checkpoints.close()
    assert (
        f"checkpoints/{step} is damaged (" in (err := capsys.readouterr().err)
        and f"going on from {intact}" in err
    )
    assert os.path.lexists(root / f"{step}.damaged") and not os.path.lexists(root / step)
    assert checkpoint.find(root) == (root, 8) and Checkpoints(root, keep=2).newest_intact() == 8


def test_directories_that_are_no_steps(root):
    """Ignore them, though Python takes their names for numbers."""
    names = ("007", "+9", " 9", "\u0669", "9_0")
    for name in names:
        (root / name).mkdir()
    checkpoints = Checkpoints(root, keep=2)
    assert checkpoints.steps() == [2, 4] and checkpoints.newest_intact() == 4
    checkpoints.open(tiny.run_config(), None)
    checkpoints.save(6, STATE, {"next_example": 6}, 1.0)
    checkpoints.close()
    assert checkpoint.find(root) == (root, 6) and all((root / name).is_dir() for name in names)


@pytest.mark.parametrize("text", ["{}", "[1]", "[" * 10**5, "junk"], ids=len)
@pytest.mark.parametrize("file", ["state/_METADATA", "meta/metadata"])
def test_a_file_replaced_before_the_manifest_was_written(root, file, text):
    (root / "4" / file).write_text(text)
    checksums.write_manifest(root / "4", step=4)
    with pytest.raises(
        UserError, match=r"checkpoints/4 cannot be read \(.*\): copy the checkpoint"
    ) as error:
        Checkpoints(root, keep=2).restore(4, abstract())
    assert "\n" not in str(error.value)
    if file == "state/_METADATA":
        with pytest.raises(
            UserError, match=r"checkpoints/4/state cannot be read \(.*\): copy the checkpoint"
        ):
            StoredWeights(root, 4)


def test_no_step_is_intact(root):
    for step in ("2", "4"):
        (root / step / "meta" / "metadata").unlink()
    with pytest.raises(
        UserError, match=r"4 is damaged \(meta/metadata is missing\), and no other step is intact"
    ) as error:
        Checkpoints(root, keep=2).newest_intact()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no other step is intact"):
        checkpoint_steps.check_intact(root, 4)


def test_what_a_kill_left_is_removed_when_the_run_goes_on(root):
    """Remove Orbax's temporary name before its own files are whole, and ours before the manifest
    is.
    """
    for name in ("6.orbax-checkpoint-tmp.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp"):
        shutil.copytree(root / "4", root / name)
        (root / name / "manifest.json").unlink()
        assert checkpoint.find(root) == (root, 4)
        checkpoints = Checkpoints(root, keep=3)
        assert checkpoints.newest_intact() == 4 and (root / name).exists()
        checkpoints.open(tiny.run_config(), None)
        checkpoints.save(6, STATE, {"next_example": 6}, 1.0)
        checkpoints.close()
        assert not (root / name).exists() and checkpoint.find(root) == (root, 6)
        shutil.rmtree(root / "6")


def test_a_step_gets_its_name_after_its_manifest(root, monkeypatch):
    def killed(*unused, **unused_facts):
        raise RuntimeError("killed")

    monkeypatch.setattr(checksums, "write_manifest", killed)
    checkpoints = Checkpoints(root, keep=3)
    checkpoints.open(tiny.run_config(), None)
    with pytest.raises(RuntimeError, match="killed"):
        checkpoints.save(6, STATE, {"next_example": 6}, 1.0)
        checkpoints.close()
    assert not (root / "6").exists()


def damage_by_host(step, monkeypatch):
    """Return what each of two hosts that share the reading finds, and what both return."""
    found, returned = [], []
    for host in (0, 1, 0, 1):  # a second time with what the other has found

        def gather(row, host=host):
            found.append(row)
            return np.stack([found[0], row] if host else [row, found[1 % len(found)]])

        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: 2)
            patch.setattr(jax, "process_index", lambda host=host: host)
            patch.setattr(checkpoint_steps.multihost_utils, "process_allgather", gather)
            returned.append(checkpoint_steps.damage(step, shared=True))
    return [row.any() for row in found[:2]], returned[2:]


@pytest.mark.parametrize("case", ["a renamed step", "nothing listed", "a flipped bit"])
def test_hosts_that_share_the_reading_find_the_same(root, monkeypatch, case):
    spoil, step, reason = BROKEN[case]
    assert damage_by_host(root / "4", monkeypatch) == ([False, False], ["", ""])
    spoil(root)
    found, returned = damage_by_host(root / step, monkeypatch)
    assert found.count(True) == (1 if case == "a flipped bit" else 2), "each reads a part"
    assert returned[0] == returned[1] and re.fullmatch(reason, returned[0])


def test_what_is_set_aside_takes_no_others_place(tmp_path):
    for number in range(3):
        (tmp_path / "4").mkdir()
        (tmp_path / "4" / str(number)).touch()
        checkpoint_steps.set_aside(tmp_path / "4")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")) == [
        "4.damaged-1/1",
        "4.damaged-2/2",
        "4.damaged/0",
    ]


def test_in_what_a_step_differs(root):
    weights = abstract().abstract["params"]
    assert checkpoint_steps.misfit(root / "4", {"params": weights}) == ""
    differs = "b is of shape (3, 5) in it, {} by the configuration"
    for other, by_configuration in ((weights["w"], "of shape (64,)"), ({}, "absent")):
        found = checkpoint_steps.misfit(root / "4", {"params": weights | {"b": other}})
        assert found == differs.format(by_configuration)
    found = checkpoint_steps.misfit(root / "4", {"frozen": {"b": weights["b"]}})
    assert found == "b is absent in it, of shape (3, 5) by the configuration"


def test_another_tokenizer_is_refused_and_a_damaged_one_written_again(root, tmp_path, capsys):
    checkpoints = Checkpoints(root, keep=2)
    text = checkpoint.stored_text(root, tiny.model().text)
    tokenizer = load_tokenizer(text)
    checkpoints.check_tokenizer(tokenizer)
    other = train_sentencepiece(tiny.CAPTIONS[:4], tmp_path / "other.model", 300)
    with pytest.raises(
        UserError,
        match=r"the text tokenizer \(model.text.path\) is another than the one in \S+/text",
    ):
        checkpoints.check_tokenizer(other)
    flip(root / "text" / "tokenizer.model", 1000)
    with pytest.raises(UserError, match=r"/text is damaged \(tokenizer.model has CRC32C"):
        checkpoint.stored_text(root, text)
    checkpoints.check_tokenizer(tokenizer)
    checkpoints.open(tiny.run_config(), tokenizer)
    checkpoints.close()
    assert load_tokenizer(checkpoint.stored_text(root, text)).proto == tokenizer.proto
    assert (root / "text.damaged").is_dir() and "set aside" in capsys.readouterr().err


@pytest.mark.parametrize("group", ["params", "opt", "ema"])
def test_a_state_that_is_not_finite_is_not_saved(root, group):
    checkpoints = Checkpoints(root, keep=2)
    state = {
        "params": {"w": np.ones(3)},
        "opt": {"m": np.ones(2), "count": np.int32(1)},
        "ema": {"w": np.ones(3)},
    }
    state[group] = {"bad": np.array([1.0, np.inf])}
    with pytest.raises(
        UserError,
        match=f"step 6 is not saved: 1 arrays of its state are not finite, first {group}/bad; ",
    ):
        checkpoints.save(6, state, {}, 1.0)
    assert not (root / "6").exists()


def tree(root):
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def read(root, plan):
    """Return all that a checkpoint holds: (step, state, position, configuration, tokenizer)."""
    config = checkpoint.read_config(root)
    tokenizer = load_tokenizer(checkpoint.stored_text(root, config.model.text))
    checkpoints = Checkpoints(root, keep=2)
    step = checkpoints.newest_intact()
    return step, *jax.device_get(checkpoints.restore(step, plan)), config, tokenizer.proto


def check_flip(root, plan, wanted, capsys, file, bit):
    """Check one flipped bit: an error of a line that names the file, a step before with such a
    line, or the same values.
    """
    name = file.relative_to(root)
    flip(file, bit)
    capsys.readouterr()
    try:
        found = read(root, plan)
    except UserError as error:
        assert "\n" not in str(error) and str(root / name.parts[0]) in str(error), (
            name,
            bit,
            error,
        )
        return "refused"
    finally:
        flip(file, bit)
    err = capsys.readouterr().err
    if found[0] != wanted[0]:
        assert f"{root / str(wanted[0])} is damaged (" in err and len(err.splitlines()) == 1, (
            name,
            bit,
            err,
        )
        return "fell back"
    assert found[2:] == wanted[2:], (name, bit)
    check_same(found[1], wanted[1])
    return "the same"


def test_a_flipped_bit_in_each_file_of_a_step_is_found(root, capsys):
    rng, plan = random.Random(0), abstract()
    wanted = read(root, plan)
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and "2" not in path.relative_to(root).parts[0]
    ]
    assert len(files) > 10
    for file in files:
        outcome = check_flip(
            root, plan, wanted, capsys, file, rng.randrange(8 * file.stat().st_size)
        )
        assert outcome == ("fell back" if file.relative_to(root).parts[0] == "4" else "refused"), (
            file
        )


@pytest.mark.slow
def test_no_flipped_bit_of_a_checkpoint_changes_a_number_silently(tmp_path, capsys):
    """Flip 500 of them, over all bytes of the checkpoint of a joint run."""
    tiny.write_checkpoint(tmp_path)
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "6", root / "4")
    checksums.write_manifest(root / "4", step=4)
    plan = plan_state(checkpoint.read_config(root), tiny.strategy())
    wanted = read(root, plan)
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    sizes = [path.stat().st_size for path in files]
    rng, outcomes = random.Random(0), {}
    for i in range(500):
        # Half of them over the bytes, half over the files: most bytes are those of a few.
        (file,) = rng.choices(files, sizes if i % 2 else None)
        outcome = check_flip(
            root, plan, wanted, capsys, file, rng.randrange(8 * file.stat().st_size)
        )
        outcomes.setdefault(outcome, []).append(file.relative_to(root).parts[0])
    assert {"4"} <= set(outcomes["the same"]) <= {"4", "config.json"}, "step 4 is not read"
    assert set(outcomes["fell back"]) == {"6"} and "text" in outcomes["refused"]
