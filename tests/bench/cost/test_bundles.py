"""Check schedules as the TPU compiler writes them, and their cycles."""

# The text of programs is quoted as the compiler prints it, in lines of any length.
# ruff: noqa: E501

import pytest

from blip3o_jax.bench.cost import bundles, walk
from blip3o_jax.parallel.chips import CHIPS
from tests.bench.cost.test_walk import torus

SCHEDULE = """= control target key start
LH: loop header
LB: loop body
= control target key end

     0   :  { %s100_s0 = inlined_call_operand.hbm [shape: bf16[8,8], index: 0, kind: input, shape index: {}] }
   0x1   :  { %20 = vsyncpa [#allocation3], 0 } /* Start region 1 */
   0x9 LB: > { %s10 = sadd.s32 1, %s9  ;;  %v1 = vmatmul.mubr.bf16.gmra.mxu0 %v0
hlo: fusion.7
 */ }
  0xff   : > { %v2 = vmatmul.mubr.bf16.gmra.mxu0 %v1 }
 0x108   :  { %60 = vsyncpa [#allocation3], 1 }
"""

PROGRAM = """HloModule m, is_scheduled=true

%fused (a: bf16[1024,4096], b: bf16[4096,4096]) -> bf16[1024,4096] {
  %a = bf16[1024,4096]{1,0} parameter(0)
  %b = bf16[4096,4096]{1,0} parameter(1)
  ROOT %d = bf16[1024,4096]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[1024,4096], b: bf16[4096,4096]) -> bf16[1024,4096] {
  %a = bf16[1024,4096]{1,0} parameter(0)
  %b = bf16[4096,4096]{1,0} parameter(1)
  %fusion.7 = bf16[1024,4096]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused, backend_config={"flag_configs":[],"window_config":{"output_window_bounds":["16","4"],"estimated_cycles":"1000000","iteration_bounds":["8","8","BOUND"]}}
  ROOT %fusion.8 = bf16[1024,4096]{1,0} fusion(%fusion.7, %b), kind=kOutput, calls=%fused, backend_config={"flag_configs":[],"window_config":{"output_window_bounds":["16","4"],"estimated_cycles":"1000000","iteration_bounds":["8","8","16"]}}
}
"""


def test_a_turn_is_the_loops_code(tmp_path):
    for name in ("7-fusion.7-01-final_bundles", "7-fusion.7-00-schedule-analysis_final_bundles"):
        (tmp_path / f"{name}.txt").write_text(SCHEDULE)
    (tmp_path / "8-copy.1-01-final_bundles.txt").write_text(SCHEDULE.replace(" LB: >", "   :  "))
    (tmp_path / "9-TLP-hlo.txt").write_text("HloModule")
    assert bundles.read(tmp_path) == {"fusion.7": 0x100}
    assert bundles.read(tmp_path / "none") == {}
    assert str(tmp_path) in bundles.dump_flags(tmp_path)


@pytest.mark.parametrize(("bound", "others"), [("16", 1), ("32", 0)], ids=["alike", "another loop"])
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_the_schedule_stands_in_for_the_estimate(chip, bound, others):
    """Run fusion.7 for 1024 turns, or 2048; fusion.8 is scheduled with it if it is identical, and
    else has the estimate."""
    found = walk.program_cost(
        PROGRAM.replace("BOUND", bound),
        torus(CHIPS[chip], (1,) * CHIPS[chip].axes),
        {"fusion.7": 5000},
    )
    first = 64 * int(bound) * 5000 / CHIPS[chip].cores
    second = first if others else 1_000_000
    assert (
        found.seconds["compute"]
        == found.total_seconds
        == pytest.approx((first + second) / CHIPS[chip].clock)
    )


def test_a_schedule_that_beats_the_matrix_unit_is_bound_by_it():
    chip = CHIPS["v5e"]
    found = walk.program_cost(PROGRAM.replace("BOUND", "16"), torus(chip, (1, 1)), {"fusion.7": 1})
    assert found.total_seconds == pytest.approx(2 * 2 * 1024 * 4096**2 / chip.flops)
