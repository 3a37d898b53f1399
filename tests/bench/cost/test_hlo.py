"""Parse excerpts of programs that XLA's TPU compiler made for v5p, as it prints them."""

# The text of programs is quoted as the compiler prints it, in lines of any length.
# ruff: noqa: E501

import pytest

from blip3o_jax.bench.cost import hlo

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
