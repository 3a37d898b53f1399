"""Compare the FLOPs that the cost model finds in the TPU program of the joint step with those
computed from the architecture."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from blip3o_jax.bench.sharding import topology
from tests.bench.cost.joint_program import WHERE, run_config
from tests.bench.cost.model_flops import joint_step

ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.slow
def test_flops_of_every_part_are_those_of_the_architecture():
    pytest.importorskip("libtpu")
    environment = os.environ | topology.settings(WHERE.chip) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.bench.cost.joint_program"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    near = lambda value: pytest.approx(value, rel=0.02)
    want = {
        part: {"forward": near(forward)} for part, (forward, _) in joint_step(run_config()).items()
    }
    for part, (_, backward) in joint_step(run_config()).items():
        if backward:
            want[part]["backward"] = near(backward)
    assert found == want
