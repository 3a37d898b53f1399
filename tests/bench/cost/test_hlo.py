"""Parse excerpts of programs that XLA's TPU compiler made for v5p, as it prints them."""

# The text of programs is quoted as the compiler prints it, in lines of any length.
# ruff: noqa: E501

import pytest

from blip3o_jax.bench.cost import hlo


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("{}", ((0, 1, 2, 3),)),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", ((0, 2), (1, 3))),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        (
            "mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}",
            ((0, 4), (1, 5), (2, 6), (3, 7)),
        ),
    ],
)
def test_replica_groups(text, want):
    assert hlo.replica_groups(text, 4) == want


def test_an_unknown_form_of_groups_is_not_guessed():
    with pytest.raises(ValueError, match="no form"):
        hlo.replica_groups("mesh['a'=2] {'b'}", 4)


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
    assert hlo.trip_count(program, main, main.by_name["while.27"]) == turns


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
    assert hlo.trip_count(program, main, main.by_name["while.27"]) == 4


SCATTER = """HloModule jit_f, is_scheduled=true, num_partitions=64

%add.clone (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)} parameter(0)
  %y = bf16[]{:T(256)} parameter(1)
  ROOT %add = bf16[]{:T(256)} add(%x, %y)
}

%all-reduce-scatter (input: bf16[4096,2048]) -> bf16[264,2048] {
  %input = bf16[4096,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[4096,2048]{1,0} all-reduce(%input), channel_id=3, replica_groups=[4,16]<=[16,4]T(1,0), to_apply=%add.clone
  ROOT %slice.2 = bf16[264,2048]{1,0:T(8,128)(2,1)} slice(%all-reduce.1), slice={[0:264], [0:2048]}
}

ENTRY %main.0_spmd (param: bf16[4096,2048]) -> bf16[264,2048] {
  %param = bf16[4096,2048]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[16,1,4]<=[64] last_tile_dim_replicate}
  %copy-start = (bf16[4096,2048]{1,0:T(8,128)(2,1)S(1)}, bf16[4096,2048]{1,0}, u32[]{:S(2)}) copy-start(%param)
  %copy-done = bf16[4096,2048]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  ROOT %fusion = bf16[264,2048]{1,0:T(8,128)(2,1)} fusion(%copy-done), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="jit(f)/transpose(jvp())/dot_general" stack_frame_id=4}, backend_config={"window_config":{"estimated_cycles":"21807"},"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion","debug":"{colors:1 phases:1}"}}
}
"""


def test_what_an_operation_says():
    program = hlo.parse(SCATTER)
    main = program.computations[program.entry]
    fusion = main.root
    assert (fusion.name, fusion.opcode, fusion.operands) == ("fusion", "fusion", ("copy-done",))
    assert fusion.called("calls") == ("all-reduce-scatter",) and fusion.estimated_cycles == 21807
    assert fusion.op_name == "jit(f)/transpose(jvp())/dot_general"
    assert [s.space for s in hlo.leaves(main.by_name["copy-start"].shape)] == [1, 0, 2]
    reduced = program.computations["all-reduce-scatter"].by_name["all-reduce.1"]
    assert reduced.replica_groups == "[4,16]<=[16,4]T(1,0)" and reduced.called("to_apply") == (
        "add.clone",
    )
    assert [op.name for op in main.ops] == ["param", "copy-start", "copy-done", "fusion"], (
        "in the order they run"
    )


KERNEL = """HloModule jit_step, is_scheduled=true

ENTRY %main (q: bf16[4,16,2048,128]) -> bf16[4,16,2048,128] {
  %q = bf16[4,16,2048,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %splash_mha_fwd.2 = bf16[4,16,2048,128]{3,2,1,0} custom-call(%q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512}"
}}, metadata={op_name="jit(step)/jvp(ar)/while/body/closed_call/attention/pallas_call" stack_frame_id=775}
  ROOT %after = bf16[4,16,2048,128]{3,2,1,0} negate(%splash_mha_fwd.2)
}
"""


def test_attributes_of_a_kernel_go_over_several_lines():
    program = hlo.parse(KERNEL)
    main = program.computations[program.entry]
    assert [op.name for op in main.ops] == [
        "q",
        "splash_mha_fwd.2",
        "after",
    ] and main.root.name == "after"
    assert main.by_name["splash_mha_fwd.2"].op_name.endswith("attention/pallas_call")


def test_pairs():
    assert hlo.device_pairs("{{0,1},{1,2}}") == ((0, 1), (1, 2))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("bf16[16,64]{1,0:T(8,128)(2,1)S(1)}", hlo.Shape("bf16", (16, 64), 1)),
        ("f32[]", hlo.Shape("f32", ())),
        ("s4[3]{0}", hlo.Shape("s4", (3,))),
        (
            "(f32[2]{0}, /*index=1*/(u32[]{:S(2)}, pred[8]))",
            (hlo.Shape("f32", (2,)), (hlo.Shape("u32", (), 2), hlo.Shape("pred", (8,)))),
        ),
        ("()", ()),
    ],
)
def test_shapes(text, want):
    assert hlo._shape(text + " add(", 0) == (want, len(text))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("bf16", 6), ("f32", 12), ("pred", 3), ("f8e4m3fn", 3), ("s4", 2), ("c64", 24)],
)
def test_bytes(dtype, size):
    assert hlo.Shape(dtype, (3,)).bytes == size


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty\n")
