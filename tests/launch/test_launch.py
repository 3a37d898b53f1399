"""Check the launchers as text: the commands they would run, their shell, the manifest.
(tests/parallel runs launch/local.sh.)"""

import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from blip3o_jax import exits
from blip3o_jax.parallel import flags

ROOT = pathlib.Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
TRAIN = ("--", "train", "--config=configs/pretrain.py:1.7b", "--workdir=gs://bucket/runs/mine")
QUEUED = ("tpu_queued.sh", "--name=mine", "--zone=us-east5-a", "--topology=v5p:8x8x8")
GKE = ("gke_jobset.sh", "--name=mine", "--image=r/blip3o:1", "--topology=v5p:8x8x8")
SLURM = ("slurm.sh", "--nodes=4")
SHARED = ("--", "train", "--config=configs/pretrain.py:1.7b", "--workdir=/shared/runs/mine")


def launch(script, *arguments, dry_run=True):
    command = ["bash", str(LAUNCH / script), *(["--dry_run"] if dry_run else []), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHON": "python3"}, cwd=ROOT
    )


def printed(script, *arguments):
    done = launch(script, *arguments)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_local_starts_every_host_with_its_devices():
    lines = printed(
        "local.sh", "-n", "2", "-d", "4", "--", "train", "--config=c.py", "--workdir=a b"
    ).splitlines()
    common = (
        "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 python3 -u -m blip3o_jax train --config=c.py "
        "--workdir=a\\ b"
    )
    hosts = (
        "--config.mesh.cpu_devices=4 --coordinator=127.0.0.1:PORT --num_processes=2 --process_id"
    )
    assert lines == [f"[{host}] {common} {hosts}={host}" for host in range(2)]
    (alone,) = printed("local.sh", "-d", "0", "--", "train", "--config=c.py").splitlines()
    assert alone.endswith(
        "JAX_NUM_CPU_DEVICES= python3 -u -m blip3o_jax train --config=c.py --distributed=off"
    )


def test_queued_resources_are_asked_for_used_and_given_back():
    lines = printed(
        *QUEUED,
        "--spot",
        "--valid_until=6h",
        *TRAIN,
        "--config.data.path=gs://bucket/captions/*.tar",
    ).splitlines()
    commands = [shlex.split(line) for line in lines]
    assert all(command[0] == "+" for command in commands)
    asked = next(command for command in commands if "create" in command)
    wanted = [
        "--type=v5p",
        "--topology=8x8x8",
        "--runtime-version=v2-alpha-tpuv5",
        "--node-id=mine",
        "--spot",
    ]
    assert asked[1:7] == ["gcloud", "compute", "tpus", "queued-resources", "create", "mine"]
    assert asked[7:] == [*wanted, "--valid-until-duration=6h", "--zone=us-east5-a"]
    ran = commands[-2][-2]
    train = "blip3o train --config=configs/pretrain.py:1.7b --workdir=/gcs/runs/mine"
    data = "--config.data.path=/gcs/captions/\\*.tar"
    again = "status=$?; case $status in 75|137) ;; *) exit $status ;; esac; done"
    assert f"{train} {data} --distributed=tpu; {again}" in ran
    assert 'eval "$(python3 blip3o_jax/parallel/flags.py v5p)"' in ran
    assert "gcsfuse --implicit-dirs bucket /gcs" in commands[-3][-2]
    assert commands[-1][1:] == shlex.split(
        "gcloud compute tpus queued-resources delete mine --force --quiet --zone=us-east5-a"
    )
    assert "delete" not in printed(*QUEUED, "--keep", *TRAIN)


def cloud(directory, state, job):
    """Return (environment, log) of a `gcloud` that records its requests: they are in `state`, and
    its machines run `job`."""
    log, program = directory / "asked", directory / "gcloud"
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {shlex.quote(str(log))}\n'
        f'case "$*" in *describe*) echo {state} ;; *"blip3o train"*) {job} ;; esac\n'
    )
    program.chmod(0o755)
    return os.environ | {"PATH": f"{directory}:{os.environ['PATH']}"}, log


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_machines_are_given_back_when_the_launcher_is_stopped(tmp_path, number, keep):
    environment, log = cloud(tmp_path, "ACTIVE", "exec sleep 10")
    command = ["bash", str(LAUNCH / QUEUED[0]), *QUEUED[1:], *["--keep"] * keep, *TRAIN]
    # A shell that runs the tests in the background has them ignore SIGINT, and a script cannot undo
    # what it inherits.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    own = {"stdout": subprocess.PIPE, "start_new_session": True, "preexec_fn": heard}
    with subprocess.Popen(command, env=environment, **own) as launcher:
        while not (log.exists() and "blip3o train" in log.read_text()):
            assert launcher.poll() is None
            time.sleep(0.02)
        launcher.send_signal(number)
        assert launcher.wait(timeout=30) != 0
        asked = log.read_text().splitlines()
        os.killpg(launcher.pid, signal.SIGKILL)
    assert any("queued-resources delete mine" in line for line in asked) is not keep


@pytest.mark.parametrize(
    ("state", "status", "message"),
    [("ACTIVE", 3, ""), ("FAILED", 2, "the request ended as FAILED before")],
)
def test_a_request_is_deleted_once_and_its_end_is_reported(tmp_path, state, status, message):
    environment, log = cloud(tmp_path, state, "exit 3")
    done = subprocess.run(
        ["bash", str(LAUNCH / QUEUED[0]), *QUEUED[1:], *TRAIN],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status and message in done.stderr
    assert log.read_text().count("queued-resources delete mine") == 1


def test_several_slices_are_nodes_of_one_request():
    lines = [shlex.split(line) for line in printed(*QUEUED, "--slices=2", *TRAIN).splitlines()]
    asked = next(line for line in lines if "create" in line)
    assert "--node-count=2" in asked and "--node-prefix=mine" in asked and "--spot" not in asked
    assert [line[6] for line in lines if "ssh" in line] == ["mine-0", "mine-1"] * 2


def test_slurm_requeues_what_has_saved():
    script = printed(
        *SLURM, "--partition=gpu", "--time=04:00:00", *SHARED, "--config.mesh.strategy=fsdp"
    )
    assert script.startswith(
        "#!/usr/bin/env bash\n#SBATCH --job-name=blip3o\n#SBATCH --nodes=4\n#SBATCH "
        "--ntasks-per-node=8\n"
    )
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --time=04:00:00",
        "#SBATCH --requeue",
        "#SBATCH --signal=TERM@120",
    ):
        assert f"{line}\n" in script
    assert "srun --wait=120 --label blip3o train --config=configs/pretrain.py:1.7b" in script
    assert "--config.mesh.strategy=fsdp --distributed=slurm || status=$?" in script
    assert 'case $status in 75|137) scontrol requeue "$SLURM_JOB_ID" ;; esac' in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def local(tmp_path, *statuses, restarts=3):
    """Return (status of local.sh, how often each host was started) for hosts that end with
    `statuses`, then with the last of them."""
    program, count = tmp_path / "python", tmp_path / "count"
    program.write_text(
        "#!/bin/bash\n[[ $2 != import* ]] || { echo 1234; exit; }\n"
        f"host=${{*: -1}}; host=${{host#--process_id=}}; echo x >> {count}$host; n=$(wc -l < "
        f"{count}$host)\n"
        f"table=({' '.join(','.join(map(str, each)) for each in statuses)})\n"
        'IFS=, read -ra mine <<< "${table[host]}"; exit "${mine[n <= ${#mine[@]} ? n - 1 : '
        '${#mine[@]} - 1]}"\n'
    )
    program.chmod(0o755)
    command = [
        "bash",
        str(LAUNCH / "local.sh"),
        "-n",
        str(len(statuses)),
        "-d",
        "0",
        "-r",
        str(restarts),
        "--",
        "train",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(program)},
        timeout=60,
    )
    return done.returncode, [
        len((tmp_path / f"count{host}").read_text().split()) for host in range(len(statuses))
    ]


@pytest.mark.parametrize(
    ("statuses", "status", "starts"),
    [
        ([[75, 0], [75, 0]], 0, 2),  # saved and stopped
        ([[137, 0], [137, 0]], 0, 2),  # one was killed, the other lost it
        ([[137, 75, 0], [75, 137, 0]], 0, 3),
        ([[137], [137]], 137, 4),  # as often as -r says
        ([[2], [137]], 2, 1),  # a user's error, whoever of them is first
        ([[137], [2]], 2, 1),
        ([[1], [137]], 1, 1),
        ([[134], [75]], 134, 1),
        ([[130], [130]], 130, 1),
        ([[143], [143]], 143, 1),
    ],
)
def test_local_restarts_on_what_the_docs_say(tmp_path, statuses, status, starts):
    assert local(tmp_path, *statuses) == (status, [starts] * 2)


def test_the_documented_statuses_are_those_of_the_launchers():
    page = (ROOT / "docs" / "pods.md").read_text()
    said = set(re.findall(r"^\| (\S+) \| .* \| yes.* \|$", page, re.MULTILINE))
    common = (LAUNCH / "common.sh").read_text()
    assert f'RESTARTED="{" ".join(sorted(said, key=int))}"' in common and said == {
        str(exits.PREEMPTED),
        str(exits.LOST_PEER),
    }


# The fields that the manifest may use, as the APIs have them (JobSet v1alpha2, batch/v1, core/v1):
# a type, a choice of values, a dict of fields (those with "?" may be missing), or a list of such.
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "resources": {"limits": {"google.com/tpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
CSI = {"driver": str, "volumeAttributes": {"bucketName": str, "mountOptions": str}}
POD = {
    "metadata": {"annotations": dict},
    "spec": {
        "restartPolicy": ("Never",),  # what a podFailurePolicy asks for
        "terminationGracePeriodSeconds": int,
        "serviceAccountName": str,
        "nodeSelector": dict,
        "containers": [CONTAINER],
        "volumes": [{"name": str, "csi": CSI}],
    },
}
EXIT_CODES = {"containerName": str, "operator": ("In", "NotIn"), "values": [int]}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": ("Indexed",),
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [
            {"action": ("FailJob", "Ignore", "Count", "FailIndex"), "onExitCodes": EXIT_CODES}
        ]
    },
    "template": POD,
}
REASONS = (
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
)
RULE = {
    "name": str,
    "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    "onJobFailureReasons": [REASONS],
}
JOBSET = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "kind": ("JobSet",),
    "metadata": {"name": str, "annotations": dict},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [RULE]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def check_fields(value, schema, where="manifest"):
    if isinstance(schema, dict):
        assert isinstance(value, dict) and set(value) == set(schema), (
            f"{where} has {set(value) ^ set(schema)}"
        )
        for key, child in schema.items():
            check_fields(value[key], child, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, where
        for item in value:
            check_fields(item, schema[0], where)
    elif isinstance(schema, tuple):
        assert value in schema, f"{where}: {value!r}"
    else:
        assert type(value) is schema, f"{where}: {value!r} is no {schema.__name__}"


def manifest(*arguments, command=TRAIN):
    yaml = pytest.importorskip("yaml")
    text = printed(*GKE, *arguments, *command)
    assert "@" not in text.replace('"$@"', "").partition("spec:")[2]
    return yaml.safe_load(text)


def test_the_manifest_is_a_jobset():
    made = manifest(
        "--spot", "--slices=2", command=(*TRAIN, '--config.data.path=/gcs/a "b" &/*.tar')
    )
    check_fields(made, JOBSET)
    slices = made["spec"]["replicatedJobs"][0]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert slices["replicas"] == 2
    assert job["parallelism"] == job["completions"] == 128  # machines of 512 chips
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "8x8x8",
        "cloud.google.com/gke-spot": "true",
    }
    # Values of annotations and selectors must be strings, which YAML's true is not.
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert container["args"] == [
        "train",
        "--config=configs/pretrain.py:1.7b",
        "--workdir=/gcs/runs/mine",
        '--config.data.path=/gcs/a "b" &/*.tar',
        "--distributed=tpu",
    ]
    assert "flags.py v5p" in container["command"][2]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "bucket"
    # Saved, killed, another host lost: these restart the JobSet, and so does a machine that is
    # gone. Any other status ends it.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "NotIn",
        "values": [75, 137],
    }


@pytest.mark.parametrize(("topology", "chips"), [("v6e:2x2", 4), ("v5e:2x4", 8), ("v6e:2x4", 8)])
def test_a_small_slice_is_one_machine(topology, chips):
    sample = ("--", "sample", "--checkpoint=gs://bucket/runs/mine", "--out=gs://bucket/drawn")
    made = manifest("--reservation=ours", f"--topology={topology}", command=sample)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == 1
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["args"] == ["sample", "--checkpoint=/gcs/runs/mine", "--out=/gcs/drawn"]
    assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/reservation-name"] == "ours"


def test_every_launcher_runs_reinforcement_learning():
    rl = ("--", "rl", "--config=configs/rl.py:shapes", "--workdir")
    bucket, shared = (*rl, "gs://bucket/r"), (*rl, "/shared/r")
    command = "rl --config=configs/rl.py:shapes --workdir"
    assert f"blip3o {command} /gcs/r --distributed=tpu;" in printed(*QUEUED, *bucket).replace(
        "\\", ""
    )
    assert f"blip3o {command} /shared/r --distributed=slurm" in printed(*SLURM, *shared)
    assert f"{command} /shared/r --distributed=off" in printed("local.sh", "-d", "0", *shared)
    (slices,) = manifest(command=bucket)["spec"]["replicatedJobs"]
    (container,) = slices["template"]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == [*command.split(), "/gcs/r", "--distributed=tpu"]
    # One process with all the GPUs of the node, for what does not run on several hosts.
    one = printed("slurm.sh", "--gpus=4", "--", "sample", "--out=drawn")
    assert "--ntasks-per-node=1\n#SBATCH --gpus-per-node=4\n" in one
    assert "blip3o sample --out=drawn ||" in one


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("local.sh", "--"), "give the command after --: train"),
        (
            ("local.sh", "-n", "2", "--", "sample"),
            "sample runs on one host (train and rl on several)",
        ),
        (("local.sh", "--", "sample", "gs://b/x"), "no bucket is mounted here"),
        (("local.sh", "-n", "two", "--", "train"), "'two' is not a whole number"),
        (("local.sh", "-n", "0", "--", "train"), "-n must be 1 or more"),
        (("local.sh", "-n", "08", "--", "train"), "'08' is not a whole number"),
        (("local.sh", "-n"), "-n needs a value"),
        (("local.sh", "-c", "v9", "--", "train"), "give one of cpu, v4"),
        (("local.sh", "-x"), "unknown argument -x"),
        (QUEUED, "give the command after --: train"),
        ((*QUEUED, "--", "--config=c.py"), "give the command after --: train"),
        ((*QUEUED, "--", "train", "--config=c.py"), "the machines share no directory"),
        ((*QUEUED, "--", "sample", "--out=gs://bucket/x"), "sample runs on one host"),
        ((*QUEUED, *TRAIN, "--config.data.path=gs://other/x"), "gs://bucket and gs://other: one"),
        ((*QUEUED, "--config=c.py"), "unknown argument --config"),
        ((*QUEUED, "--topology=v9:2x2", *TRAIN), "--topology=v9:2x2 is not CHIP:AxB"),
        ((*QUEUED, "--topology=v5e:3x3", *TRAIN), "9 chips, not a multiple of 4"),
        ((*QUEUED, "--topology=tpu7x:4x4x4", *TRAIN), "use gke_jobset.sh"),
        ((*QUEUED, *TRAIN, "--workdir=runs/mine"), "the machines share no directory"),
        ((*QUEUED, *TRAIN, "--workdir=gs://bucket"), "needs a directory in the bucket"),
        ((*QUEUED, "--spot", "--reserved", *TRAIN), "exclude each other"),
        ((*QUEUED, "--sport"), "unknown argument --sport"),
        ((*QUEUED, "--spot=false"), "--spot takes no value"),
        ((*QUEUED, "--name"), "--name needs a value"),
        (
            (*QUEUED, "--topology=v5p:8x8", *TRAIN),
            "--topology=v5p:8x8 is not CHIP:AxB of v5e, v6e, or CHIP:AxBxC of v4",
        ),
        ((*QUEUED, "--topology=v5e:4x4x4", *TRAIN), "--topology=v5e:4x4x4 is not CHIP:AxB of v5e"),
        ((*QUEUED, "--topology=v5p:08x8x8", *TRAIN), "--topology=v5p:08x8x8 is not"),
        ((*QUEUED, "--slices=two", *TRAIN), "--slices=two is not a whole number of 1 or more"),
        ((*QUEUED, "--restarts=-1", *TRAIN), "--restarts=-1 is not a whole number of 0 or more"),
        ((*GKE, *TRAIN, "--workdir=/data/mine"), "pods share a bucket"),
        ((*GKE, "--topology=v5e:2x4", "--", "sample"), "the command names no bucket"),
        ((*GKE, "--slices=0", *TRAIN), "--slices=0 is not a whole number of 1 or more"),
        ((*SLURM, *TRAIN), "a file system that all nodes see"),
        ((*SLURM, "--chip=v100", *SHARED), "give one of cpu, v4"),
        ((*SLURM, "--gpus=0", *SHARED), "--gpus=0 is not a whole number of 1 or more"),
    ],
)
def test_mistakes_are_one_line(arguments, words):
    done = launch(*arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not done.stdout


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "common.sh"])
def test_help_is_the_header(script):
    done = launch(script, "--help", dry_run=False)
    assert done.returncode == 0 and f"launch/{script}" in done.stdout and "--dry_run" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script):
    shellcheck = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        [shellcheck, "-x", f"launch/{script}"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


def test_every_flag_has_a_reason_and_a_source():
    for setting in flags.SETTINGS:
        assert setting.chips and set(setting.chips) <= set(flags.CHIPS)
        assert setting.reason and setting.source.startswith(("https://", "measured: "))
    assert all(
        value in flags.explain() for value in ("ynn_fusion_type", "LIBTPU_INIT_ARGS", flags.MAXTEXT)
    )
    # Each chip has some; TPU flags stay out of XLA_FLAGS, which jaxlib reads.
    for chip in flags.CHIPS:
        assert flags.exports(chip)
        assert not any("tpu" in s.value and s.variable == "XLA_FLAGS" for s in flags.SETTINGS)


@pytest.mark.parametrize(
    ("chip", "libtpu", "fused"),
    [("v5p", "0.0.42.1", True), ("v5p", "0.0.48.1", False), ("v5e", "0.0.48.1", True)],
)
def test_a_flag_that_the_installed_compiler_refuses_is_left_out(monkeypatch, chip, libtpu, fused):
    monkeypatch.setattr(flags.importlib.metadata, "version", lambda name: libtpu)
    assert ("fuse_all_gather=true" in flags.exports(chip)) is fused


@pytest.mark.parametrize(
    "given",
    [{}, {"XLA_FLAGS": "--xla_mine=1", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}],
    ids=["empty", "set"],
)
@pytest.mark.parametrize("chip", ["cpu", "h100"])
def test_what_is_set_already_wins(chip, given):
    """Check in a shell and from Python: another variable stays, and of equal flags the last one
    counts."""
    script = f'eval "$({sys.executable} blip3o_jax/parallel/flags.py {chip})"; env'
    env = {"PATH": os.environ["PATH"]} | given
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=env, cwd=ROOT, check=True
    )
    values = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    want = {
        "cpu": {"XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type="},
        "h100": {
            "XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
        },
    }[chip]
    if given:
        want = {
            name: f"{value} --xla_mine=1" if name == "XLA_FLAGS" else given[name]
            for name, value in want.items()
        }
    assert {name: values[name].strip() for name in want} == flags.environment(chip, given) == want


def dist_extras():
    return set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))


def test_the_image_holds_what_it_runs():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"blip3o_jax", "configs", "launch"} <= set(copied)
    # Every command runs in it; `test` and `docs` are for this repository alone.
    (install,) = re.findall(r'"\.\[\$EXTRA,([a-z,]+)\]"', "".join(lines))
    extras = dist_extras() - {"tpu", "cuda", "test", "docs"}
    assert set(install.split(",")) == extras
    assert json.loads(
        next(line for line in lines if line.startswith("ENTRYPOINT")).partition(" ")[2]
    ) == ["blip3o"]
