"""Search the largest batch on made-up compilers."""

import dataclasses

import pytest

from blip3o_jax.bench.isolated_process import FAILED, REFUSED
from blip3o_jax.bench.sharding import grid, largest_batch, topology
from blip3o_jax.bench.sharding.compiled_step import FITS, TOO_LARGE
from tests import tiny

GIB = 2**30
CONFIG = tiny.run_config()
WHERE = topology.parse("v5e:2x2")


def task(step="train", strategy="fsdp", **optimizer):
    config = dataclasses.replace(
        CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, **optimizer)
    )
    return grid.make_task(
        config, WHERE, strategy, grid.Options(("v5e:2x2",), step=step, largest_batch=True)
    )


def compiler(fixed, slope, curve=0.0, reports_needs=True, capacity=15.75 * GIB, step="data"):
    """Return a compiler that needs fixed + n slope + n^2 curve for n examples a chip."""

    def compile_row(task):
        n = getattr(task.config, step).batch_size / 4
        total = (fixed + n * slope + n * n * curve) * GIB
        if total <= capacity:
            return {
                "status": FITS,
                "memory": {"parameters": fixed / 2 * GIB, "total": total, "capacity": 16 * GIB},
            }
        needs = {"needs_bytes": total, "capacity_bytes": capacity}
        return {"status": TOO_LARGE, "error": "too large"} | (needs if reports_needs else {})

    return compile_row


@pytest.mark.parametrize(
    ("memory", "want", "most"),
    [
        ((8, 1.3), 5, 4),
        ((5, 0.1), 107, 6),
        ((1, 0.5, 0.05), 12, 7),
        ((1, 0.05, -3e-5), 383, 8),
    ],
)
@pytest.mark.parametrize("reports_needs", [True, False])
def test_the_largest_that_fits_and_the_smallest_that_does_not(memory, want, most, reports_needs):
    said = []
    row = largest_batch.largest(task(), compiler(*memory, reports_needs=reports_needs), said.append)
    found = row["batch_per_chip"]
    assert (
        0 <= want - found <= want // largest_batch.FINE_UNITS
        and row["batch_size"] == 4 * found
        and row["status"] == FITS
    )
    outcomes = {t["batch_per_chip"]: t["status"] for t in row["tried"]}
    beyond = min(n for n, status in outcomes.items() if status == TOO_LARGE)
    assert beyond > want and beyond - found <= max(1, want // largest_batch.FINE_UNITS)
    assert len(row["tried"]) == len(outcomes) <= most, "nothing is compiled twice"
    assert said[:2] == [
        "compiling with 1 a chip",
        f"1 a chip fits ({row['tried'][0]['bytes'] / GIB:.1f} GiB)",
    ]
    assert len(said) == 2 * len(outcomes)


def test_a_bracket_that_is_narrow_enough_ends_the_search():
    row = largest_batch.largest(task(), compiler(5, 1e-5), lambda text: None)
    assert row["batch_per_chip"] == pytest.approx(1075000, rel=1 / largest_batch.FINE_UNITS)
    assert len(row["tried"]) <= 8


def test_where_not_even_the_smallest_fits_that_is_the_row():
    row = largest_batch.largest(task(), compiler(20, 1), lambda text: None)
    assert (row["status"], row["batch_per_chip"], len(row["tried"])) == (TOO_LARGE, 1, 1)


@pytest.mark.parametrize("status", [REFUSED, FAILED])
def test_what_is_refused_is_not_tried_again(status):
    row = largest_batch.largest(
        task(), lambda task: {"status": status, "error": "heads do not divide"}, lambda text: None
    )
    assert row["status"] == status and row["tried"] == [
        {"batch_size": 4, "batch_per_chip": 1.0, "status": status, "error": "heads do not divide"}
    ]


def test_batches_are_multiples_of_what_divides_over_the_mesh():
    assert largest_batch.unit(task()) == 4
    assert largest_batch.unit(task(strategy="fsdp_tp")) == 2, "two devices of a pair share a row"
    assert largest_batch.unit(task(accumulate=2)) == 8
    assert largest_batch.unit(task("rollout", accumulate=2)) == 4
    row = largest_batch.largest(task(strategy="fsdp_tp"), compiler(8, 1.3), lambda text: None)
    assert row["batch_per_chip"] == 5.5


def test_a_rollout_grows_in_prompts():
    row = largest_batch.largest(
        task("rollout"), compiler(8, 1.3, step="sampling"), lambda text: None
    )
    assert row["batch_per_chip"] == 5


def test_a_compile_that_died_says_nothing_of_the_batch():
    """Check that the largest batch that the compiler accepted stays the answer, with the failure in
    the report."""

    def compile_row(task):
        if task.config.data.batch_size > WHERE.chips:
            return {"status": FAILED, "error": "the compiling process ended with status -9"}
        return {
            "status": FITS,
            "memory": {
                "parameters": GIB,
                "temporaries": GIB,
                "total": 2 * GIB,
                "capacity": 16 * GIB,
            },
        }

    row = largest_batch.largest(task(), compile_row, lambda text: None)
    assert (row["status"], row["batch_per_chip"]) == (FITS, 1)
    assert [t["status"] for t in row["tried"]] == [FITS, FAILED]
