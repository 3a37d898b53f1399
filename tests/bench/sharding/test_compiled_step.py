"""Check the arguments of a compiled step, and its mesh."""

import dataclasses

import jax
import pytest

from blip3o_jax.bench import isolated_process
from blip3o_jax.bench.sharding import compiled_step, grid, topology
from blip3o_jax.bench.sharding.measure import LocalDevices
from blip3o_jax.config import MeshConfig, UserError
from blip3o_jax.parallel.chips import CHIPS
from blip3o_jax.parallel.mesh import cpu_environment
from tests import tiny

CONFIG = tiny.run_config()


def test_the_mesh_is_that_of_a_run(monkeypatch):
    """Use a width of 20, which does not divide over 8 chips, so that the planner takes 4; what the
    user has set stays."""
    where = topology.parse("v5e:2x4")
    monkeypatch.setattr(topology, "make_devices", lambda where: jax.devices())
    model = dataclasses.replace(
        CONFIG.model, dit=dataclasses.replace(CONFIG.model.dit, caption_channels=20)
    )
    config = dataclasses.replace(CONFIG, model=model)
    free = grid.make_task(config, where, "fsdp", grid.Options(("v5e:2x4",)))
    mesh = compiled_step.plan_work(free).strategy.mesh.shape
    assert (mesh["data"], mesh["fsdp"]) == (2, 4)
    chosen = grid.Options(("v5e:2x4",), chosen=frozenset({"fsdp"}))
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=8))
    with pytest.raises(UserError, match="does not divide over mesh axes fsdp = 8"):
        compiled_step.plan_work(grid.make_task(config, where, "fsdp", chosen))


@pytest.mark.parametrize(
    ("message", "used", "capacity"),
    [
        (
            "Ran out of memory in memory space hbm. Used 120.50G of 95.74G hbm. Exceeded hbm "
            "capacity by 24.76G.",
            120.5,
            95.74,
        ),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (40.25G) "
            "exceeds available HBM (15.75G).",
            40.25,
            15.75,
        ),
    ],
)
def test_what_the_compiler_says_of_too_little_memory(message, used, capacity):
    parsed = compiled_step._parse_too_large(f"RESOURCE_EXHAUSTED: {message}")
    assert parsed["needs_bytes"] == used * 2**30 and parsed["capacity_bytes"] == capacity * 2**30
    assert parsed["error"] == f"needs {used:.1f} GiB of the {capacity:.1f} GiB that a device has"


def test_the_process_gets_the_flags_of_what_it_compiles_for(monkeypatch):
    seen = []
    monkeypatch.setattr(
        isolated_process, "run_isolated", lambda work, environment: seen.append(environment) or {}
    )
    where = topology.parse("v5e:2x2")
    compiled_step.compile_isolated(compiled_step.Task(CONFIG, where, flags="--xla_one=1"))
    compiled_step.compile_isolated(compiled_step.Task(CONFIG, where))
    compiled_step.compile_isolated(compiled_step.Task(CONFIG, where, schedules=False))
    here = dataclasses.replace(CONFIG, mesh=MeshConfig(cpu_devices=8))
    compiled_step.compile_isolated(compiled_step.Task(here, LocalDevices(CHIPS["H100"], 8)))
    recommended = topology.settings(where.chip)
    of_schedules = " --xla_jf_dump_to="
    flags = [environment["LIBTPU_INIT_ARGS"].split(of_schedules)[0] for environment in seen[:2]]
    assert flags == ["--xla_one=1", recommended["LIBTPU_INIT_ARGS"]], (
        "the launchers', where the task has none"
    )
    assert all(
        of_schedules in e["LIBTPU_INIT_ARGS"] and e["JAX_PLATFORMS"] == "cpu" for e in seen[:2]
    )
    assert seen[2] == recommended, "no schedules asked for"
    assert seen[3] == cpu_environment(8), "as the user runs it"
