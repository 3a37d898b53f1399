"""Run hosts as real processes (launch/local.sh): they start, agree, are killed, stopped and
resumed."""

import dataclasses
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import pytest

from blip3o_jax import cli, exits
from blip3o_jax import config as config_lib
from blip3o_jax.ar import attention
from blip3o_jax.config import MeshConfig, UserError
from blip3o_jax.parallel import distributed
from blip3o_jax.parallel.distributed import Launch
from blip3o_jax.train import checkpoint, supervised
from blip3o_jax.train.metrics import read_rows
from tests import conftest, tiny

ROOT = pathlib.Path(__file__).parent.parent.parent
STEPS, EVERY = 12, 4
# As in the tests' own process, so that compiled programs are shared and numbers comparable.
ENVIRONMENT = {
    "PYTHON": sys.executable,
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(conftest.CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
}
# The same sums in another order (devices of one process or two, gradients all-reduced or
# reduce-scattered): float32 rounding, 1e-7 of a loss, which 12 steps of Adam blow up; 6e-7 was the
# largest seen. Another batch changes a loss by percents.
ROUNDING = 5e-6


def settings(**changes):
    groups = {
        "checkpoint": {"every": EVERY, "keep": 100},
        "mesh": {"data": 1, "fsdp": -1, "strategy": "fsdp"},
    }
    return tiny.run_config(
        tiny.data(), stage="tokenizer", steps=STEPS, preview=0, watchdog=2.0, **groups | changes
    )


def config_file(directory, cfg):
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(json.dumps(config_lib.to_dict(cfg)))
    path = directory / "config.py"
    path.write_text(
        "import json\n\nfrom blip3o_jax import config\n\n\n"
        f"def get_config():\n    return config.from_dict(json.loads({text}))\n"
    )
    return path


class Job:
    """Run launch/local.sh with its log."""

    count = itertools.count()

    def __init__(self, directory, workdir, cfg, hosts, devices, *arguments, command="train"):
        self.workdir, self.log = workdir, directory / f"log{next(self.count)}"
        script = [
            ROOT / "launch" / "local.sh",
            "-n",
            hosts,
            "-d",
            devices,
            "-c",
            "none",
            *arguments,
            "--",
        ]
        script += [command, f"--config={config_file(directory, cfg)}", f"--workdir={workdir}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, script)),
                stdout=log,
                stderr=log,
                env=os.environ | ENVIRONMENT,
                cwd=ROOT,
                start_new_session=True,
            )

    def text(self):
        return self.log.read_text()

    def pid(self, host):
        """Return the process id of the last start."""
        return int(re.findall(rf"host {host} is process (\d+)", self.text())[-1])

    def until(self, condition, seconds=240):
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.005)

    def until_step(self, step):
        """Wait until the job is past `step`, and has a checkpoint."""
        saved = lambda: any(p.name.isdigit() for p in (self.workdir / "checkpoints").glob("*"))
        self.until(lambda: len(read_rows(self.workdir / "metrics.jsonl")) >= step and saved())

    def wait(self):
        return self.process.wait(timeout=240)

    def end(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def job():
    """Make jobs, and end the remaining ones."""
    started = []

    def start(*args):
        started.append(Job(*args))
        return started[-1]

    yield start
    for each in started:
        each.end()


def losses(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["train/loss"] for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the losses of an uninterrupted run on eight devices of one process, every parameter on
    each of them."""
    workdir = tmp_path_factory.mktemp("whole")
    supervised.train(settings(mesh={"data": -1, "fsdp": 1, "strategy": "dp"}), workdir)
    return losses(workdir)


def test_two_hosts_one_of_them_killed_go_on_as_one(whole, job, tmp_path):
    """Run 2 x 4 devices, fsdp; host 1 hangs, which the watchdog reports, and is killed, which host
    0 reports; then resume on 1 x 8 devices, dp, from the checkpoint."""
    workdir = tmp_path / "run"
    pair = job(tmp_path, workdir, settings(), 2, 4, "-r", 0)
    pair.until_step(EVERY + 1)
    os.kill(pair.pid(1), signal.SIGSTOP)
    report = (
        r"\[0\] watchdog: no progress for \d+ s: host 1 is silent since \w+ at step \d+; host 0 in "
    )
    pair.until(lambda: re.search(report, pair.text()))
    assert "[1] watchdog" not in pair.text()
    os.kill(pair.pid(1), signal.SIGKILL)
    assert pair.wait() == 128 + signal.SIGKILL
    for host in range(2):
        assert f"local.sh: host {host} ended with status 137" in pair.text()
    assert re.search(
        r"\[0\] host 0: blip3o: host 1 was lost in \w+ at step \d+; the same command goes on",
        pair.text(),
    )
    assert "Traceback" not in pair.text()
    stopped_at = len(losses(workdir))
    assert stopped_at < STEPS
    others = r"local\.sh: .*|\[0\] (watchdog|host 0): .*"
    assert "host 1" not in re.sub(others, "", pair.text())  # host 0 speaks for all

    alone = job(tmp_path, workdir, settings(mesh={"data": -1, "fsdp": 1, "strategy": "dp"}), 1, 8)
    assert alone.wait() == 0, alone.text()
    start = int(re.search(r"resuming at step (\d+) of .* with mesh.data: 1 -> -1", alone.text())[1])
    assert 0 < start <= stopped_at and start % EVERY == 0
    assert losses(workdir) == pytest.approx(whole, rel=ROUNDING)


def test_sigterm_on_one_host_saves_on_all_and_the_launcher_restarts(job, tmp_path):
    """Use a run that is long enough not to end before the hosts have agreed where to stop."""
    steps = 8 * STEPS
    cfg = dataclasses.replace(settings(checkpoint={"every": 1000}), steps=steps)
    pair = job(tmp_path, tmp_path / "run", cfg, 2, 1, "-r", 1)
    pair.until(lambda: len(read_rows(tmp_path / "run" / "metrics.jsonl")) >= 2)
    os.kill(pair.pid(1), signal.SIGTERM)
    assert pair.wait() == 0, pair.text()
    for host in range(2):
        assert f"local.sh: host {host} ended with status 75" in pair.text()
    step = int(
        re.search(r"\[0\] tokenizer: stopped by SIGTERM, step (\d+) of 96 is saved", pair.text())[1]
    )
    assert 2 < step < steps
    assert f"[0] tokenizer: resuming at step {step} of" in pair.text()
    supervised.train(
        dataclasses.replace(cfg, mesh=MeshConfig(data=-1, fsdp=1, strategy="dp")),
        tmp_path / "whole",
    )
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=ROUNDING)
    root, last = checkpoint.find(tmp_path / "run")
    assert last == steps and (root / str(step)).is_dir()
    meta = json.loads((root / str(step) / "meta" / "metadata").read_text())
    assert meta["data"]["next_example"] == step * 8


@pytest.mark.slow
def test_two_hosts_train_a_vocabulary_and_fill_an_encoder_cache_once(job, tmp_path):
    """Check files that one host writes and both read. Host 0 alone trains the vocabulary; each host
    fills its parts of the cache."""
    cfg = tiny.run_config(
        tiny.data(), steps=3, preview=0, data={"cache_dir": str(tmp_path / "cache")}
    )
    pair = job(tmp_path, tmp_path / "pair", cfg, 2, 1)
    assert pair.wait() == 0, pair.text()
    assert len(list((tmp_path / "cache").rglob("codes-*.npy"))) == 1
    supervised.train(tiny.run_config(tiny.data(), steps=3, preview=0), tmp_path / "alone")
    # Latents from the cache are another program's than the step's: a few units in the last place
    # (tests/train/test_loop.py).
    assert losses(tmp_path / "pair") == pytest.approx(losses(tmp_path / "alone"), rel=ROUNDING)


def test_a_mistake_ends_all_hosts_and_is_no_reason_to_restart(job, tmp_path):
    pair = job(tmp_path, tmp_path / "run", settings(data={"batch_size": 12}), 2, 4)
    assert pair.wait() == 2
    assert "blip3o: error: data.batch_size=12 does not divide over 8 batch shards" in pair.text()
    assert "Traceback" not in pair.text() and "restart" not in pair.text()


def two_hosts(tmp_path, *arguments, cwd=(ROOT, ROOT)):
    """Start two processes that differ in `arguments` and directory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = config_file(tmp_path, settings())
    processes = []
    for host in range(2):
        flags = [
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={host}",
            f"--config={path}",
        ]
        command = [sys.executable, "-m", "blip3o_jax", "train", *flags, *arguments[host]]
        environment = (
            os.environ
            | ENVIRONMENT
            | {"PYTHONPATH": str(cwd[host] if (cwd[host] / "blip3o_jax").exists() else ROOT)}
        )
        processes.append(
            subprocess.Popen(
                command, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd[host]
            )
        )
    return processes


def said_by(processes):
    """Return (stderr, status) of each."""
    return [(p.communicate(timeout=120)[1], p.returncode) for p in processes]


@pytest.mark.slow
def test_ctrl_c_after_sigterm_does_not_lose_the_save_of_several_hosts(tmp_path):
    """Send both to host 1, one right after the other.

    The line that Ctrl-C prints is not asserted: the step may be saved before Ctrl-C is handled.
    """
    flags = [
        f"--workdir={tmp_path / 'run'}",
        "--config.steps=2000",
        "--config.checkpoint.every=10000",
    ]
    hosts = two_hosts(tmp_path, flags, flags)
    while len(read_rows(tmp_path / "run" / "metrics.jsonl")) < 2:
        assert hosts[1].poll() is None
        time.sleep(0.05)
    hosts[1].send_signal(signal.SIGTERM)
    hosts[1].send_signal(signal.SIGINT)
    zero, one = said_by(hosts)
    assert zero[1] == one[1] == exits.PREEMPTED, (zero, one)
    step = int(re.search(r"stopped by SIGTERM, step (\d+) of 2000 is saved", zero[0])[1])
    assert checkpoint.find(tmp_path / "run")[1] == step


def test_hosts_that_disagree_are_refused_with_one_line(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    said = said_by(
        two_hosts(tmp_path, [workdir], [workdir, "--config.seed=3", "--config.optimizer.b1=0.5"])
    )
    assert said == [
        (
            "blip3o: error: the hosts disagree, nothing was run: host 1 has another configuration "
            "than host 0: "
            "optimizer.b1 is 0.5, not 0.9, seed is 3, not 0\n",
            2,
        ),
        ("", 2),
    ]
    assert not (tmp_path / "run").exists()


def test_an_error_on_one_host_ends_all_with_its_status(tmp_path):
    """Hide the images from host 1. Host 0, which waits for it in a collective, gets the error."""
    tiny.write_data(tmp_path / "zero" / "images")
    (tmp_path / "one").mkdir()
    flags = [f"--workdir={tmp_path / 'run'}", "--config.data.path=images"]
    zero, one = said_by(
        two_hosts(tmp_path, flags, flags, cwd=(tmp_path / "zero", tmp_path / "one"))
    )
    assert zero[1] == one[1] == 2
    assert re.fullmatch(r"host 1: blip3o: error: .*images.*: no such file or directory.*\n", one[0])
    assert (
        "host 0: blip3o: host 1 ended with status 2 in start at step 0; the same command goes on"
        in zero[0]
    )


@pytest.mark.slow
def test_hosts_with_other_code_are_refused(tmp_path):
    shutil.copytree(ROOT / "blip3o_jax", tmp_path / "other" / "blip3o_jax")
    with (tmp_path / "other" / "blip3o_jax" / "lora.py").open("a") as file:
        file.write("# changed\n")
    workdir = f"--workdir={tmp_path / 'run'}"
    said = said_by(two_hosts(tmp_path, [workdir], [workdir], cwd=(ROOT, tmp_path / "other")))
    assert re.fullmatch(
        r"blip3o: error: .*: host 1 runs other code than host 0: blip3o_jax is '\w+', not '\w+'\n",
        said[0][0],
    )
    assert said[1] == ("", 2)


def test_what_hosts_disagree_on_is_named(tmp_path):
    code = distributed.code_version()
    zero = {"workdir": str(tmp_path), "config": {"a": [1], "b": 2}, "code": code, "token": "token"}
    mine = {"workdir": str(tmp_path), "config": {"a": (1,), "b": 2}, "code": code}
    (tmp_path / "token").touch()
    assert distributed._inconsistency(mine, zero, 1) == ""
    many = mine | {"config": {name: 0 for name in "abcdef"}}
    complaint = distributed._inconsistency(many, zero, 5)
    assert complaint.startswith(
        "host 5 has another configuration than host 0: a is 0, not [1], b is 0, not 2, c is 0, not "
        "None"
    )
    assert complaint.endswith(", and 3 more")
    other = mine | {"code": code | {"jax": "0.1"}}
    assert (
        distributed._inconsistency(other, zero, 1)
        == f"host 1 runs other code than host 0: jax is '0.1', not {code['jax']!r}"
    )
    unshared = mine | {"workdir": str(tmp_path / "mine")}
    assert "host 2 does not see what host 0 writes to" in distributed._inconsistency(
        unshared, zero, 2, patience=0.0
    )


def test_the_code_version_is_of_the_source_files(tmp_path, monkeypatch):
    copy = tmp_path / "blip3o_jax"
    shutil.copytree(ROOT / "blip3o_jax", copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(distributed, "__file__", str(copy / "parallel" / "distributed.py"))
    before = distributed.code_version()
    assert before["jax"] == jax.__version__
    (copy / "__pycache__").mkdir()
    assert distributed.code_version() == before
    (copy / "new.py").touch()
    assert distributed.code_version()["blip3o_jax"] != before["blip3o_jax"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--coordinator=h:1"], "go together: --num_processes and --process_id not given"),
        (["--process_id=0", "--num_processes=2"], "go together: --coordinator not given"),
        (
            ["--coordinator=h:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2 must lie in 0 .. 1",
        ),
        (
            ["--coordinator=h", "--num_processes=2", "--process_id=0"],
            "'h' names no port: give it as HOST:PORT",
        ),
        (
            ["--coordinator=h:1", "--num_processes=2", "--process_id=0", "--distributed=slurm"],
            "exclude each other",
        ),
        (["--distributed=slurm"], "did not find each other through --distributed=slurm"),
        (["--workdir=gs://bucket/run"], "is no directory: mount the bucket"),
    ],
)
def test_mistakes_in_the_flags_are_one_line(flags, words, tmp_path, capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    try:
        status = cli.main(["train", f"--config={config_file(tmp_path, settings())}", *flags])
    except SystemExit as exit:
        status = exit.code
    err = capsys.readouterr().err
    assert status == 2 and words in err and err.count("\n") == 1


def test_how_hosts_are_found(monkeypatch):
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    assert Launch("auto").resolved() == "off"  # these tests run on no TPU
    assert Launch("tpu").resolved() == "tpu"
    assert Launch(coordinator="h:1", num_processes=2, process_id=1).resolved() == "flags"
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert Launch("auto").resolved() == "off"  # inside an allocation, but no task of it
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert Launch("auto").resolved() == "slurm"
    assert Launch("off").resolved() == "off"


def test_the_kernel_that_was_chosen_is_in_the_log(caplog):
    package = logging.getLogger("blip3o_jax")
    level = package.level
    attention.default_implementation.cache_clear()
    try:
        distributed.run(
            Launch("off"),
            lambda: attention.default_implementation("cpu", "float32", whole_rows=True),
        )
    finally:
        package.setLevel(level)
    assert caplog.messages == ["attention over whole rows in float32 on cpu: xla"]


def test_a_job_that_is_left_is_not_asked_about_errors(monkeypatch):
    """Shut down the client of `jax.distributed`, as after the run, or after status 75."""
    left = types.SimpleNamespace(
        close=lambda: None,
        lost=lambda: pytest.fail("asked"),
        notify_peers=lambda *_: pytest.fail("notified"),
    )

    def initialize(launch):
        distributed._peers.append(left)
        exits.process.prefix, exits.process.find_cause, exits.process.notify_peers = (
            "host 0: ",
            distributed._cause,
            left.notify_peers,
        )

    monkeypatch.setattr(exits, "process", exits._Process())
    for name, value in {
        "initialize": initialize,
        "process_count": lambda: 2,
        "barrier": lambda *_: None,
    }.items():
        monkeypatch.setattr(distributed, name, value)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    assert distributed.run(Launch(), lambda: None) == 0
    error = RuntimeError("later")
    assert exits.process.find_cause(error) is distributed._cause(error) is error
    assert exits.process.prefix == "" and exits.process.notify_peers is not left.notify_peers


def test_alone_there_is_nobody_to_wait_for(tmp_path):
    assert (distributed.process_index(), distributed.process_count()) == (0, 1)
    distributed.barrier("test")
    distributed.check_consistent({}, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    with pytest.raises(UserError, match="once"), distributed.host_0_first("test"):
        raise UserError("once")
