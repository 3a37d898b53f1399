"""Count the iterations of loops that XLA's TPU compiler made for v5p, as it prints them."""

# The text of programs is quoted as the compiler prints it, in lines of any length.
# ruff: noqa: E501

import pytest

from blip3o_jax.bench.cost import hlo
from blip3o_jax.bench.cost.trip_counts import trip_count

LOOP = """HloModule jit_loss, is_scheduled=true, num_partitions=4

%region_1.2_spmd (wide.param.1: (s32[], bf16[8,512], s32[])) -> pred[] {
  %wide.param.1 = (s32[]{:T(128)}, bf16[8,512]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %get-tuple-element.195 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  %bound = BOUND
  ROOT %lt.11 = pred[]{:T(512)} compare(%get-tuple-element.195, %bound), direction=LT, metadata={op_name="while/cond/lt"}
}

%region_0.1_spmd.sunk (wide.param.2: (s32[], bf16[8,512], s32[])) -> (s32[], bf16[8,512], s32[]) {
  %constant.55 = s32[]{:T(128)} constant(1)
  %wide.param.2 = (s32[]{:T(128)}, bf16[8,512]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %get-tuple-element.265 = s32[]{:T(128)} get-tuple-element(%wide.param.2), index=0
  %get-tuple-element.266 = bf16[8,512]{1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.2), index=1
  %add.28 = s32[]{:T(128)} add(%get-tuple-element.265, %constant.55), metadata={op_name="jit(loss)/jvp()/while/body/add"}
  ROOT %tuple.57 = (s32[], bf16[8,512], s32[]) tuple(%add.28, %get-tuple-element.266, %constant.55)
}

ENTRY %main.5_spmd (param.4: bf16[8,512], n: s32[]) -> bf16[8,512] {
  %constant.60.clone = s32[]{:T(128)} constant(2)
  %constant.52 = s32[]{:T(128)} constant(9)
  %param.4 = bf16[8,512]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[4,1]<=[4]}, metadata={op_name="x"}
  %n = s32[]{:T(128)} parameter(1)
  %copy.29 = s32[]{:T(128)} copy(%constant.60.clone), backend_config={"flag_configs":[],"aliasing_operands":{"lists":[]}}
  %tuple.57 = (s32[]{:T(128)}, bf16[8,512], s32[]{:T(128)}) tuple(%copy.29, %param.4, THIRD)
  %while.27 = (s32[], bf16[8,512], s32[]) while(%tuple.57), condition=%region_1.2_spmd, body=%region_0.1_spmd.sunk
  ROOT %get-tuple-element.128 = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while.27), index=1
}
"""
PASSED = "s32[]{:T(128)} get-tuple-element(%wide.param.1), index=2"


@pytest.mark.parametrize(
    ("bound", "third", "turns"),
    [
        ("s32[]{:T(128)} constant(5)", "%constant.52", 3),
        (PASSED, "%constant.52", 7),
        (PASSED, "%n", None),
    ],
    ids=["of the condition", "of the first values", "of the program's argument"],
)
def test_a_loop_turns_from_its_first_value_to_its_bound(bound, third, turns):
    program = hlo.parse(LOOP.replace("BOUND", bound).replace("THIRD", third))
    main = program.computations[program.entry]
    assert trip_count(program, main, main.by_name["while.27"]) == turns


def test_a_loop_that_counts_by_two_turns_half_as_often():
    """Count 7 iterations, from 2 to 9, as in loops in which the compiler multiplies by shards that
    arrive from both directions of the ring."""
    text = LOOP.replace("BOUND", PASSED).replace("THIRD", "%constant.52")
    program = hlo.parse(
        text.replace(
            "%constant.55 = s32[]{:T(128)} constant(1)", "%constant.55 = s32[]{:T(128)} constant(2)"
        )
    )
    main = program.computations[program.entry]
    assert trip_count(program, main, main.by_name["while.27"]) == 4
