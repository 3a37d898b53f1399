"""Open a run's directory from an untrusted sender: no command imports a module, reads a variable of
the environment or a file elsewhere, or connects to anything because of its contents."""

import ast
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import socket
import sys

import jax
import numpy as np
import pytest

from blip3o_jax import checksums, cli
from blip3o_jax.config import RewardConfig
from blip3o_jax.convert import exporter
from blip3o_jax.data.prompts import Prompt
from blip3o_jax.evaluation import shapes
from blip3o_jax.pipeline import Generated, Pipeline
from blip3o_jax.rl.log import RolloutLog
from blip3o_jax.rl.rescore import rewards_of
from blip3o_jax.rl.reward_batch import RewardBatch
from blip3o_jax.train import checkpoint, initialize
from blip3o_jax.train.state import plan_state
from tests import tiny
from tests.rl.runs import started_from

VARIABLE = "BLIP3O_TEST_SECRET"


class Watch:
    """Record the actions of a command that its directory alone must not cause. `armed` while it
    runs: audit hooks stay."""

    def __init__(self):
        self.armed, self.elsewhere, self.seen = False, "", []
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if not self.armed:
            return
        reads = (
            event in ("open", "os.listdir", "os.scandir") and f"{self.elsewhere}/" in f"{args[0]}/"
        )
        # Import looks through all of sys.path for any module.
        reads = reads and (event, str(args[0])) != ("os.listdir", self.elsewhere)
        imports = event == "import" and args[0].startswith("hostile_module")
        if reads or imports or event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            self.seen.append((event, args))


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture(scope="module", autouse=True)
def restored_once():
    """Restore each part once: most commands read the same parts, which takes most of their time."""
    restore, parts_read = checkpoint.restore_parts, {}

    def once(path, strategy, parts=(), **options):
        if parts not in parts_read:
            parts_read[parts] = restore(path, strategy, parts, **options)
        return parts_read[parts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "plan_state", functools.cache(plan_state))
        patch.setattr(checkpoint, "restore_parts", once)
        patch.setattr(initialize, "restore_parts", once)
        yield


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Write the files that the directory names and must not reach: a module that leaves a mark,
    prompts, data, a tokenizer, another run."""
    place = tmp_path_factory.mktemp("elsewhere")
    (place / "hostile_module.py").write_text(
        f"open({str(place / 'imported')!r}, 'w')\ndef score(*_): return [1.0]\n"
    )
    (place / "prompts.jsonl").write_text('{"prompt": "secret"}\n')
    shutil.copytree(started_from(), place / "run")
    return place


@pytest.fixture(scope="module")
def server():
    """Open a socket to which no command may connect."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


def hostile(elsewhere, server):
    """Return {field: value} of a config.json."""
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
    rewards = [
        RewardConfig("python:hostile_module.score"),
        RewardConfig("http", options=(("urls", url), ("token_env", VARIABLE))),
        RewardConfig("clip", options=(("path", str(elsewhere / "run")),)),
    ]
    return {
        "rl.rewards": [dataclasses.asdict(reward) for reward in rewards],
        "rl.prompts_file": str(elsewhere / "prompts.jsonl"),
        "data.path": str(elsewhere / "data" / "*.tar"),
        "data.cache_dir": str(elsewhere / "cache"),
        "checkpoint.init_from": [["ar", str(elsewhere / "run")], ["dit", "http://127.0.0.1/run"]],
        "model.text.path": str(elsewhere / "run" / "checkpoints" / "text"),
        "model.text.train_size": 0,
    }


@pytest.fixture
def received(elsewhere, server, watch, tmp_path, monkeypatch, rng):
    """Return a run of reinforcement learning with its checkpoint and its images, every possible
    field of config.json hostile."""
    run = tmp_path / "received"
    shutil.copytree(started_from(), run)
    rewrite(run / "checkpoints" / "config.json", hostile(elsewhere, server))
    log = RolloutLog(run, 0, 0, 0, keep_images=True)
    images = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    log.write(
        0,
        [0, 1],
        0,
        [Prompt("a red cat", {})] * 2,
        images,
        RewardBatch(np.ones(2, np.float32), np.zeros(2, bool), {}),
    )
    log.close()
    monkeypatch.syspath_prepend(str(elsewhere))
    monkeypatch.setenv(VARIABLE, "secret")
    read = []
    original = os._Environ.__getitem__
    monkeypatch.setattr(
        os._Environ, "__getitem__", lambda self, key: read.append(key) or original(self, key)
    )
    watch.seen.clear()
    watch.elsewhere, watch.armed = str(elsewhere), True
    yield run
    watch.armed = False
    assert watch.seen == [] and not (elsewhere / "imported").exists()
    assert "hostile_module" not in sys.modules and VARIABLE not in read
    with pytest.raises(BlockingIOError):
        server.accept()


def rewrite(file, changes):
    values = json.loads(file.read_text())
    values.pop("crc32c", None)  # whoever means harm leaves out a checksum, or makes another
    for path, value in changes.items():
        *above, name = path.split(".")
        group = functools.reduce(lambda place, key: place[key], above, values)
        assert name in group, path
        group[name] = value
    file.write_text(json.dumps(values))


def test_rescore_asks_for_the_rewards_to_be_named(received, capsys):
    assert cli.main(["rl", "rescore", f"--run={received}"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "names the reward python:hostile_module.score" in line
    assert "--reward=python:hostile_module.score --reward=http,urls=http://127.0.0.1" in line
    assert not (received / "rescored.jsonl").exists()


def test_local_rewards_are_taken_from_it(received):
    rewards = (RewardConfig("shapes", weight=0.5), RewardConfig("ocr", clip=(0.0, 1.0)))
    values = [dataclasses.asdict(reward) for reward in rewards]
    rewrite(received / "checkpoints" / "config.json", {"rl.rewards": values})
    assert rewards_of(received) == rewards


def drawn(self, requests, **_):
    """Return images at once, where a model would be compiled."""
    return Generated(
        [r.text for r in requests],
        np.zeros((len(requests), 64, 64, 3), np.uint8),
        np.zeros((len(requests), 4)),
    )


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--prompt=a red cat", "--out=OUT"],
        ["edit", "--instruction=blue", "--image=IMAGE", "--out=OUT"],
        ["reconstruct", "--image=IMAGE", "--out=OUT"],
        ["ask", "--question=what", "--image=IMAGE"],
        ["evaluate", "--suite=shapes", "--num_prompts=2", "--out=OUT"],
        ["convert", "export", "--out=OUT"],
    ],
    ids=lambda command: command[0],
)
def test_commands_that_read_a_checkpoint(received, tmp_path, monkeypatch, command):
    monkeypatch.setattr(Pipeline, "generate_requests", drawn)
    monkeypatch.setattr(Pipeline, "ask", lambda self, shown, texts, **_: texts)
    monkeypatch.setattr(
        shapes, "SMALLEST", 16
    )  # the model's images are smaller than the scorer takes
    monkeypatch.setattr(exporter, "check_space", lambda out, needed: None)
    image = next(received.glob("rollouts/*/*.png"))
    flag = "--source" if command[0] == "convert" else "--checkpoint"
    arguments = [
        text.replace("OUT", str(tmp_path / "out")).replace("IMAGE", str(image)) for text in command
    ]
    assert cli.main([*arguments, f"{flag}={received}"]) == 0


def test_a_run_that_starts_from_it(received):
    """Check `blip3o rl` and `train`, which read the model and no other field of its config.json."""
    config = initialize.from_checkpoint(received, trained=("ar",))
    assert (
        config.rl.rewards == ()
        and config.rl.prompts_file == ""
        and config.data.path == config.data.cache_dir == ""
    )
    assert {path for _, path in config.checkpoint.init_from} == {
        str(received / "checkpoints" / "6")
    }
    assert config.model.text.path == str(received / "checkpoints" / "text")
    given = initialize.restore_init_parts(
        config, checkpoint.plan_state(config, tiny.strategy()), tiny.strategy()
    )
    assert jax.tree.leaves(given["ar"])


@pytest.mark.parametrize("name", ["ELSEWHERE/run", "../elsewhere", "..", "", 3, None])
def test_a_recipe_leads_nowhere_else(received, elsewhere, name, capsys):
    value = str(elsewhere / "run") if name == "ELSEWHERE/run" else name
    checksums.write_json(received / "recipe.json", {"stages": [value]})
    assert (
        cli.main(["sample", f"--checkpoint={received}", "--prompt=a", f"--out={received}/out"]) == 2
    )
    assert "recipe.json names no stage in that directory: put back" in capsys.readouterr().err


def test_no_file_is_unpickled():
    """Check that no file is read by pickle, which processes of this package use between each other;
    PyTorch's files are read as weights alone."""
    package = pathlib.Path(cli.__file__).parent.parent
    own = {"rl/rewards/processes.py", "bench/isolated_process.py"}
    for file in package.rglob("*.py"):
        for call in (
            node
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
        ):
            options = {
                keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords
            }
            called = ast.unparse(call.func)
            assert not options.get("allow_pickle"), file
            assert called != "torch.load" or options["weights_only"] is True, file
            assert (
                called not in ("pickle.load", "pickle.loads")
                or str(file.relative_to(package)) in own
            ), file
