"""Check the cost of programs whose cost is known: by XLA's own count, by the jaxpr's, or by
hand."""

# The text of programs is quoted as the compiler prints it, in lines of any length.
# ruff: noqa: E501

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax.bench.cost import hlo, walk
from blip3o_jax.bench.cost.hlo_bytes import operation_bytes
from blip3o_jax.bench.cost.network import Network
from blip3o_jax.bench.sharding import topology
from blip3o_jax.parallel.chips import CHIPS, HOP_S
from blip3o_jax.train.flops import count_flops
from tests.bench.cost.test_hlo import SCATTER

V5P = CHIPS["v5p"]
ROOT = pathlib.Path(__file__).parents[3]


def torus(chip=V5P, sizes=(4, 4, 4), mesh=None, slices=1):
    """Return chips in the order of their coordinates, the last axis fastest."""
    coords = np.array(list(np.ndindex(*sizes)) * slices)
    number = np.repeat(np.arange(slices), len(coords) // slices)
    return Network(chip, mesh or {"fsdp": len(coords)}, coords, np.zeros(len(coords), int), number)


ONE = torus(sizes=(1, 1, 1))


def zeros(*shape):
    return jnp.zeros(shape, jnp.float32)


def conv(stride=1, groups=1, dilation=1):
    return lambda x, w: jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        "SAME",
        rhs_dilation=(dilation, dilation),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def gradient(fn, *args):
    return lambda *args: jax.vjp(fn, *args)[1](zeros(*jax.eval_shape(fn, *args).shape))


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (jnp.matmul, (zeros(3, 5), zeros(5, 7))),
        (lambda a, b: jnp.einsum("bld,bdk->blk", a, b), (zeros(4, 3, 5), zeros(4, 5, 7))),
        (conv(), (zeros(2, 6, 4, 5), zeros(3, 3, 5, 8))),
        (conv(stride=2), (zeros(2, 7, 5, 5), zeros(3, 3, 5, 8))),
        (conv(groups=8), (zeros(2, 6, 4, 8), zeros(3, 3, 1, 8))),
        (conv(groups=2), (zeros(2, 6, 4, 8), zeros(5, 5, 4, 6))),
        (conv(dilation=2), (zeros(2, 7, 6, 5), zeros(3, 3, 5, 8))),
        (gradient(jnp.matmul), (zeros(3, 5), zeros(5, 7))),
        (gradient(conv()), (zeros(2, 6, 4, 5), zeros(3, 3, 5, 8))),
        # Holes between the values of the input, and of the kernel.
        (gradient(conv(stride=2)), (zeros(2, 7, 5, 5), zeros(3, 3, 5, 8))),
        (gradient(conv(dilation=2)), (zeros(2, 7, 6, 5), zeros(3, 3, 5, 8))),
        # The kernel's gradient has groups of the batch.
        (gradient(conv(groups=2)), (zeros(2, 6, 4, 8), zeros(5, 5, 4, 6))),
        (gradient(conv(groups=8, stride=2)), (zeros(2, 6, 4, 8), zeros(3, 3, 1, 8))),
    ],
    ids=[
        "matrices",
        "batched",
        "conv",
        "strided",
        "depthwise",
        "grouped",
        "dilated",
        "gradient of matrices",
        "gradient of conv",
        "gradient of strided",
        "gradient of dilated",
        "gradient of grouped",
        "gradient of depthwise strided",
    ],
)
def test_flops_are_those_of_xla_where_there_is_no_loop(fn, args):
    lowered = jax.jit(fn).lower(*args)
    found = walk.program_cost(lowered.as_text(dialect="hlo"), ONE)
    assert found.total_flops == lowered.cost_analysis()["flops"] > 0


def test_a_loop_counts_as_often_as_it_turns():
    def fn(x, w):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0].sum()

    args = zeros(3, 5), zeros(11, 5, 5)
    for f in (fn, jax.grad(fn, (0, 1))):
        lowered = jax.jit(f).lower(*args)
        assert walk.program_cost(lowered.as_text(dialect="hlo"), ONE).total_flops == count_flops(
            f, *args
        )
    assert lowered.cost_analysis()["flops"] < count_flops(f, *args) / 5, "XLA counts the body once"


def test_a_loop_of_unknown_length_is_a_share_of_the_time_that_is_not_known():
    """Put all operations into a loop, and in it a second one that must not count twice."""

    def fn(n, x, w):
        inner = lambda x: jax.lax.while_loop(
            lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ w), (0, x)
        )[1]
        return jax.lax.while_loop(
            lambda c: c[0] < n, lambda c: (c[0] + 1, inner(c[1] @ w)), (0, x)
        )[1]

    found = walk.program_cost(
        jax.jit(fn).lower(4, zeros(64, 32), zeros(32, 32)).as_text(dialect="hlo"), ONE
    )
    assert found.total_flops == 2 * 2 * 64 * 32 * 32
    assert found.unknown["loop of unknown length, counted once"].count == 2
    assert 0.99 < found.unknown_fraction <= 1 + 1e-9


@pytest.mark.parametrize(
    ("op_name", "want"),
    [
        ("jit(step)/jvp(ar)/while/body/dot_general", ("ar", "forward")),
        ("jit(step)/transpose(jvp(ar))/while/body/checkpoint/dot_general", ("ar", "backward")),
        (
            "jit(step)/transpose(jvp(dit))/while/body/rematted_computation/dot_general",
            ("dit", "recomputed"),
        ),
        ("jit(step)/encode/tokenizer/while/body/dot_general", ("tokenizer", "forward")),
        ("jit(step)/jvp(cross_entropy)/while/body/dot_general", ("cross_entropy", "forward")),
        ("jit(step)/jvp(ar)/transpose", ("ar", "forward")),
        ("jit(step)/sharding", ("other", "forward")),
        ("", ("other", "forward")),
    ],
)
def test_part_and_pass(op_name, want):
    assert walk.scope(op_name) == want


def test_collectives_go_by_the_axes_of_the_mesh():
    """Gather an array that is sharded over one axis of 2 x 4 devices along that axis, each device
    with its own group."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    at = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    for axis in ("data", "fsdp"):
        w = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=at(axis))
        text = jax.jit(lambda w: w * 2, out_shardings=at()).lower(w).compile().as_text()
        found = walk.program_cost(text, torus(mesh={"data": 2, "fsdp": 4}, sizes=(2, 2, 2)))
        assert {key: (t.count, t.size) for key, t in found.collectives.items()} == {
            ("all-gather", (axis,), "ICI"): (1, 16 * 64 * 4)
        }


# --- by hand


def test_a_gather_over_the_whole_torus_takes_every_link():
    """Use 64 chips, three rings of 4: six links out of each chip, and half a ring of hops along
    each axis."""
    size = 64e6
    want = size * 63 / 64 / (6 * V5P.link_rate) + 6 * HOP_S
    assert torus().seconds("all-gather", size, range(64)) == pytest.approx(want)
    assert torus().seconds("all-reduce", size, range(64)) == pytest.approx(2 * want)


def test_an_axis_that_is_no_ring_goes_one_way():
    """Use two chips side by side, with one link between them."""
    assert torus(sizes=(2, 1, 1)).seconds("all-gather", 8e6, range(2)) == pytest.approx(
        4e6 / V5P.link_rate + HOP_S
    )


def test_groups_that_interleave_share_their_links():
    """Gather chips 0, 2 of a ring of 4 and chips 1, 3 at the same time."""
    network = torus(sizes=(4, 1, 1), mesh={"fsdp": 2, "tensor": 2})
    assert network.axes((0, 2)) == ("fsdp",) and network.axes((0, 1)) == ("tensor",)
    assert network.seconds("all-gather", 8e6, (0, 2)) == pytest.approx(
        4e6 / (2 * V5P.link_rate / 2) + HOP_S
    )


def test_between_slices_each_device_sends_its_share():
    """Reduce over 2 slices of 4: in each slice over links, between them a quarter of the array for
    each device."""
    network = torus(sizes=(4, 1, 1), slices=2, mesh={"data": 2, "fsdp": 4})
    assert network.crosses(range(8)) and not network.crosses(range(4))
    inside = network.seconds("all-reduce", 8e6, range(4))
    want = inside + 2 * 8e6 / 4 * (1 / 2) / V5P.dcn_rate
    assert network.seconds("all-reduce", 8e6, range(8)) == pytest.approx(want)
    assert network.seconds("all-reduce", 8e6, (0, 4)) == pytest.approx(2 * 8e6 / 2 / V5P.dcn_rate)


def test_all_to_all_is_bound_by_the_middle_of_the_ring():
    """Count one hop for a block on average on a ring of 4, over 8 directed links: scaling-book,
    "sharding"."""
    network = torus(sizes=(4, 1, 1))
    assert network.seconds("all-to-all", 8e6, range(4)) == pytest.approx(
        8e6 * 4 / 8 / V5P.link_rate + 2 * HOP_S
    )


OVERLAP = """HloModule m, is_scheduled=true, num_partitions=4

ENTRY %main (a: bf16[1024,4096], b: bf16[4096,4096], c: bf16[1024,4096]) -> (bf16[1024,4096], bf16[4096,4096]) {
  %a = bf16[1024,4096]{1,0} parameter(0)
  %b = bf16[4096,4096]{1,0} parameter(1)
  %c = bf16[1024,4096]{1,0} parameter(2)
  %s = (bf16[1024,4096]{1,0}, bf16[4096,4096]{1,0}) all-gather-start(%c), replica_groups=[1,4]<=[4], dimensions={0}
  PRODUCT
  %d = bf16[4096,4096]{1,0} all-gather-done(%s)
  ROOT %r = (bf16[1024,4096]{1,0}, bf16[4096,4096]{1,0}) tuple(%a, %d)
}
"""
PRODUCT = (
    "%p = bf16[1024,4096]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
)


def test_only_what_the_core_waits_for_is_exposed():
    network = torus(sizes=(4, 1, 1))
    gather = network.seconds("all-gather", 4096 * 4096 * 2, range(4))
    work = 2 * 1024 * 4096**2 / V5P.flops
    assert 0 < work < gather
    key = ("all-gather", ("fsdp",), "ICI")
    for product, hidden in (("", 0.0), (PRODUCT, work)):
        found = walk.program_cost(OVERLAP.replace("PRODUCT", product), network)
        assert found.collectives[key].seconds == pytest.approx(gather)
        assert found.collectives[key].exposed == pytest.approx(gather - hidden)
        assert found.total_seconds == pytest.approx(gather)
        assert found.seconds["compute"] == pytest.approx(hidden)


CHAIN = """HloModule m, is_scheduled=true, num_partitions=4

%start (p: bf16[1024,4096]) -> (bf16[1024,4096], bf16[4096,4096]) {
  %p = bf16[1024,4096]{1,0} parameter(0)
  %g = bf16[4096,4096]{1,0} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %k = (bf16[1024,4096]{1,0}, bf16[4096,4096]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[1024,4096], q: bf16[4096,4096], a: bf16[1024,4096], b: bf16[4096,4096]) -> (bf16[4096,4096]) {
  %p = bf16[1024,4096]{1,0} parameter(0)
  %q = bf16[4096,4096]{1,0} parameter(1)
  %a = bf16[1024,4096]{1,0} parameter(2)
  %b = bf16[4096,4096]{1,0} parameter(3)
  %d = bf16[1024,4096]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g = bf16[4096,4096]{1,0} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %t = (bf16[1024,4096]{1,0}, bf16[1024,4096]{1,0}, bf16[4096,4096]{1,0}) tuple(%d, %p, %g)
}

%end (p: bf16[1024,4096], q: bf16[4096,4096]) -> bf16[4096,4096] {
  %p = bf16[1024,4096]{1,0} parameter(0)
  %q = bf16[4096,4096]{1,0} parameter(1)
  %g = bf16[4096,4096]{1,0} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %k = bf16[4096,4096]{1,0} custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[1024,4096], b: bf16[4096,4096], c: bf16[1024,4096]) -> bf16[4096,4096] {
  %a = bf16[1024,4096]{1,0} parameter(0)
  %b = bf16[4096,4096]{1,0} parameter(1)
  %c = bf16[1024,4096]{1,0} parameter(2)
  %s = (bf16[1024,4096]{1,0}, bf16[4096,4096]{1,0}) fusion(%c), kind=kCustom, calls=%start
  %p = bf16[1024,4096]{1,0} get-tuple-element(%s), index=0
  %q = bf16[4096,4096]{1,0} get-tuple-element(%s), index=1
  %f = (bf16[1024,4096]{1,0}, bf16[1024,4096]{1,0}, bf16[4096,4096]{1,0}) fusion(%p, %q, %a, %b), kind=kOutput, calls=%beside
  %u = bf16[1024,4096]{1,0} get-tuple-element(%f), index=1
  %v = bf16[4096,4096]{1,0} get-tuple-element(%f), index=2
  ROOT %r = bf16[4096,4096]{1,0} fusion(%u, %v), kind=kCustom, calls=%end
}
"""


def test_a_gather_spread_over_fusions_is_one_gather_that_overlaps_their_work():
    network = torus(sizes=(4, 1, 1))
    gather = network.seconds("all-gather", 4096 * 4096 * 2, range(4))
    work = 2 * 1024 * 4096**2 / V5P.flops
    found = walk.program_cost(CHAIN, network)
    traffic = found.collectives["all-gather", ("fsdp",), "ICI"]
    assert (traffic.count, traffic.size) == (1, 4096 * 4096 * 2)
    assert traffic.exposed == pytest.approx(gather - work)
    assert found.total_seconds == pytest.approx(gather)
    assert found.hbm_bytes == 2 * (1024 * 4096 + 4096 * 4096 + 1024 * 4096), "of the product alone"


def test_a_fusion_of_a_reduction_and_a_slice_is_a_reduce_scatter():
    """Use 16 chips along the first axis of the mesh, each with 16 MiB."""
    network = torus(sizes=(4, 4, 4), mesh={"fsdp": 16, "tensor": 4})
    found = walk.program_cost(SCATTER, network)
    key = ("reduce-scatter", ("fsdp",), "ICI")
    assert set(found.collectives) == {key}
    assert (found.collectives[key].count, found.collectives[key].size) == (1, 4096 * 2048 * 2)
    seconds = network.seconds("reduce-scatter", 4096 * 2048 * 2, range(0, 64, 4))
    assert found.collectives[key].exposed == pytest.approx(seconds)


def test_what_no_formula_knows_is_reported_and_not_free():
    text = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[1024,1024]) -> f32[1024,1024] {
  %a = f32[1024,1024]{1,0} parameter(0)
  ROOT %k = f32[1024,1024]{1,0} custom-call(%a), custom_call_target="mystery"
}
"""
    found = walk.program_cost(text, ONE)
    assert found.unknown["custom-call mystery"].count == 1
    assert found.unknown_fraction == 1.0 and found.hbm_bytes == 2 * 4 * 2**20


def test_splash_attention_counts_half_of_the_square():
    """Use 8 heads of 128, 4096 queries and keys: two products forward."""
    text = """HloModule m, is_scheduled=true

ENTRY %main (q: bf16[8,4096,128], k: bf16[8,4096,128]) -> bf16[8,4096,128] {
  %q = bf16[8,4096,128]{2,1,0} parameter(0)
  %k = bf16[8,4096,128]{2,1,0} parameter(1)
  ROOT %splash_mha_fwd.1 = bf16[8,4096,128]{2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call"
}
"""
    found = walk.program_cost(text, ONE)
    assert found.total_flops == pytest.approx(2 * 2 * 8 * 4096 * 4096 * 128 / 2, rel=1e-3)
    assert not found.unknown


SLICED = """HloModule m, is_scheduled=true

%fused (p0: f32[28,512,512], p1: s32[], p2: f32[8,512]) -> f32[8,512] {
  %p0 = f32[28,512,512]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[8,512]{1,0:T(8,128)S(1)} parameter(2)
  %zero = s32[] constant(0)
  %one = f32[1,512,512]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,512,512}
  %w = f32[512,512]{1,0} bitcast(%one)
  ROOT %y = f32[8,512]{1,0} dot(%p2, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (stack: f32[28,512,512], i: s32[], x: f32[8,512]) -> f32[8,512] {
  %stack = f32[28,512,512]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[8,512]{1,0:T(8,128)S(1)} parameter(2)
  ROOT %f = f32[8,512]{1,0} fusion(%stack, %i, %x), kind=kOutput, calls=%fused
}
"""


def test_a_slice_of_a_stack_is_read_and_not_the_stack():
    """Count one layer of 1 MiB, 4 bytes of index, 16 KiB written; arrays in the core's memory
    are free."""
    program = hlo.parse(SLICED)
    main = program.computations[program.entry]
    assert operation_bytes(program, main, main.root) == 512 * 512 * 4 + 4 + 8 * 512 * 4


def test_a_program_of_the_tpu_compiler():
    """Run five layers, each gathered for the forward and the backward pass, its gradient scattered;
    the forward pass twice."""
    pytest.importorskip("libtpu")
    environment = os.environ | topology.settings(CHIPS["v5e"]) | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.bench.cost.tpu_program"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    product = 2 * 32 * 256 * 512 * 512 * 5
    assert found["flops"] == {
        "ar forward": product,
        "ar recomputed": product,
        "ar backward": 2 * product,
    }
    assert found["counted"] == 4 * product
    assert found["collectives"] == {"all-gather fsdp ICI": 10, "reduce-scatter fsdp ICI": 5}
    assert found["unknown"] == 0


BRANCHES = """HloModule m, is_scheduled=true

%before () -> pred[4] {
  %count = s32[4]{0} iota(), iota_dimension=0
  %three = s32[]{:T(128)} constant(3)
  %threes = s32[4]{0} broadcast(%three), dimensions={}
  ROOT %lt = pred[4]{0} compare(%count, %threes), direction=LT
}

%pass (t: (f32[64,32], f32[32,32])) -> f32[64,32] {
  %t = (f32[64,32]{1,0}, f32[32,32]{1,0}) parameter(0)
  ROOT %x = f32[64,32]{1,0} get-tuple-element(%t), index=0
}

%layer (t: (f32[64,32], f32[32,32])) -> f32[64,32] {
  %t = (f32[64,32]{1,0}, f32[32,32]{1,0}) parameter(0)
  %x = f32[64,32]{1,0} get-tuple-element(%t), index=0
  %w = f32[32,32]{1,0} get-tuple-element(%t), index=1
  ROOT %y = f32[64,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (p: (s32[], f32[64,32], f32[32,32], pred[4])) -> (s32[], f32[64,32], f32[32,32], pred[4]) {
  %p = (s32[]{:T(128)}, f32[64,32]{1,0}, f32[32,32]{1,0}, pred[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[64,32]{1,0} get-tuple-element(%p), index=1
  %w = f32[32,32]{1,0} get-tuple-element(%p), index=2
  %run = pred[4]{0} get-tuple-element(%p), index=3
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %here = pred[1]{0} dynamic-slice(%run, %i), dynamic_slice_sizes={1}
  %number = s32[1]{0} convert(%here)
  %which = s32[]{:T(128)} bitcast(%number)
  %t = (f32[64,32]{1,0}, f32[32,32]{1,0}) tuple(%x, %w)
  %y = f32[64,32]{1,0} conditional(%which, %t, %t), branch_computations={%pass, %layer}
  ROOT %r = (s32[]{:T(128)}, f32[64,32]{1,0}, f32[32,32]{1,0}, pred[4]{0}) tuple(%next, %y, %w, %run)
}

%condition (p: (s32[], f32[64,32], f32[32,32], pred[4])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[64,32]{1,0}, f32[32,32]{1,0}, pred[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %four = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[]{:T(512)} compare(%i, %four), direction=LT
}

ENTRY %main (x: f32[64,32], w: f32[32,32], given: pred[4]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %w = f32[32,32]{1,0} parameter(1)
  %given = pred[4]{0} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %run = RUN
  %t = (s32[]{:T(128)}, f32[64,32]{1,0}, f32[32,32]{1,0}, pred[4]{0}) tuple(%zero, %x, %w, %run)
  %loop = (s32[]{:T(128)}, f32[64,32]{1,0}, f32[32,32]{1,0}, pred[4]{0}) while(%t), condition=%condition, body=%body
  ROOT %y = f32[64,32]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("run", "turns"),
    [
        ("pred[4]{0} fusion(), kind=kLoop, calls=%before", 3),
        ("pred[4]{0} constant({0, 1, 1, 0})", 2),
        ("pred[4]{0} copy(%given)", 4),
    ],
    ids=["counted", "listed", "not known: the dearest"],
)
def test_a_branch_counts_as_often_as_its_loop_takes_it(run, turns):
    found = walk.program_cost(BRANCHES.replace("RUN", run), ONE)
    assert found.total_flops == pytest.approx(turns * 2 * 64 * 32 * 32) and not found.unknown


OFFLOADED = """HloModule m, is_scheduled=true

ENTRY %main (stack: bf16[4,8192,1024], x: bf16[1,8192,1024], i: s32[]) -> (bf16[4,8192,1024], bf16[1,8192,1024]) {
  %stack = bf16[4,8192,1024]{2,1,0:S(5)} parameter(0)
  %x = bf16[1,8192,1024]{2,1,0} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %out = ((bf16[4,8192,1024]{2,1,0:S(5)}, bf16[1,8192,1024]{2,1,0}, s32[]{:T(128)}), bf16[4,8192,1024]{2,1,0:S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%stack, %x, %i)
  %in = ((bf16[4,8192,1024]{2,1,0:S(5)}, s32[]{:T(128)}), bf16[1,8192,1024]{2,1,0}, u32[]{:S(2)}) dynamic-slice-start(%stack, %i), dynamic_slice_sizes={1,8192,1024}
  %there = bf16[4,8192,1024]{2,1,0:S(5)} dynamic-update-slice-done(%out)
  %here = bf16[1,8192,1024]{2,1,0} dynamic-slice-done(%in)
  ROOT %r = (bf16[4,8192,1024]{2,1,0:S(5)}, bf16[1,8192,1024]{2,1,0}) tuple(%there, %here)
}
"""


def test_copies_to_the_host_and_from_it_go_both_ways_at_once():
    """Write a layer of a stack on the host while another is read: 16 MiB each."""
    found = walk.program_cost(OFFLOADED, ONE)
    size = 8192 * 1024 * 2
    assert found.seconds["host"] == found.total_seconds == pytest.approx(size / V5P.host_rate)
    assert found.hbm_bytes == 2 * size and found.limiter == "host" and not found.unknown
