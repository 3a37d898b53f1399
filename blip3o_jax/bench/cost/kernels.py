"""Count the FLOPs and cycles of kernels that are opaque to XLA. A multiply-add is two.

Splash attention is far from the matrix unit's peak where heads are smaller than the unit: of v6e's
256 x 256 multipliers a head of 128 fills half, and each score costs the vector unit a dozen
instructions. The compiler schedules a kernel bundle by bundle, one a cycle, and a block of scores
is straight-line code. `_BUNDLES` are counted in its dump (libtpu 0.0.42.1), written with

    LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"

as DIR/*splash*final_bundles.txt: jax's kernel, causal with segments, blocks of 512 x 512, the
backward pass in one kernel, four rows a device.
"""

import dataclasses
import re
from collections.abc import Callable

from blip3o_jax.bench.cost.hlo import Computation, Op, Shape, leaves
from blip3o_jax.parallel.chips import Chip


@dataclasses.dataclass(frozen=True)
class Work:
    """Hold the work of one custom call on one device; `cycles` of its clock, 0 where they have not
    been counted."""

    flops: int
    cycles: float = 0.0


def kernel_work(computation: Computation, op: Op, chip: Chip) -> Work | None:
    """Return the work of a custom call, or None where no formula is known."""
    operands = [s for name in op.operands for s in leaves(computation.by_name[name].shape)]
    for name, formula in KERNELS.items():
        if name in op.name or name in op.attributes:
            return formula(op, operands, chip)
    return None


# Products of queries' size times keys' length that a splash attention kernel makes: forward q k and
# p v; backward q k again, dp = do v, then dq, or dv and dk, or all three where the kernel has three
# results.
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}
_COUNTED_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Bundles:
    """Count the bundles of one block of scores; of a row of blocks, before its first and after its
    last; and of every step of the grid, also where the block is left out."""

    block: int
    row: int
    step: int


# (chip, head size, kernel). A device of two cores spreads the heads over them.
_BUNDLES = {
    ("v5e", 128, "fwd"): Bundles(1218, 772, 90),
    ("v5e", 128, "dkv"): Bundles(2514, 437, 81),
    ("v5e", 256, "fwd"): Bundles(2190, 926, 89),
    ("v5e", 256, "dkv"): Bundles(4844, 1048, 203),
    ("v5p", 128, "fwd"): Bundles(1209, 789, 198),
    ("v5p", 128, "dkv"): Bundles(2397, 576, 242),
    ("v5p", 256, "fwd"): Bundles(2216, 1059, 217),
    ("v5p", 256, "dkv"): Bundles(4593, 997, 250),
    ("v6e", 128, "fwd"): Bundles(945, 422, 119),
    ("v6e", 128, "dkv"): Bundles(1617, 276, 102),
    ("tpu7x", 128, "fwd"): Bundles(940, 562, 179),
    ("tpu7x", 128, "dkv"): Bundles(1573, 449, 198),
}


def _splash(op: Op, operands: list[Shape], chip: Chip) -> Work | None:
    """Return the work of causal splash attention
    (jax.experimental.pallas.ops.tpu.splash_attention): blocks above the diagonal are left out, and
    half of each on it is counted. Queries [.., heads, L, K] are the first of the floating-point
    operands, then keys [.., S, K]."""
    found = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", op.attributes + op.name)
    arrays = [s for s in operands if s.dtype in ("bf16", "f32") and len(s.dims) >= 3]
    if not found or len(arrays) < 2:
        return None
    (queries, keys), kind = arrays[:2], found[1]
    products = _SPLASH[kind]
    if kind == "dkv" and sum(len(s.dims) >= 3 and s.dtype != "s8" for s in leaves(op.shape)) >= 3:
        products = 5
    flops = int(2 * products * queries.size * (keys.dims[-2] + 1) / 2)
    return Work(flops, _splash_cycles(op, queries, keys, kind, chip))


def _splash_cycles(op: Op, queries: Shape, keys: Shape, kind: str, chip: Chip) -> float:
    length, head = queries.dims[-2:]
    bundles = _BUNDLES.get((chip.name, head, kind))
    suffix = "" if kind == "fwd" else f"_{kind}"
    q_block = re.search(rf'"block_q{suffix}\\*": (\d+)', op.attributes)
    kv_block = re.search(rf'"block_kv{suffix}\\*": (\d+)', op.attributes)
    if bundles is None or q_block is None or kv_block is None:
        return 0.0
    q, kv = int(q_block[1]), int(kv_block[1])
    rows, columns = length / q, keys.dims[-2] / kv
    # Of the blocks in a row those up to the diagonal's; with a row's tokens over several devices,
    # on average.
    blocks = rows * (columns + 1) / 2
    scale = q * kv / _COUNTED_BLOCK**2
    # Rows of blocks are the keys' in the backward pass.
    begun = rows * q if kind == "fwd" else columns * kv
    one_head = (
        blocks * scale * bundles.block
        + begun / _COUNTED_BLOCK * bundles.row
        + rows * columns * bundles.step
    )
    return queries.size / (length * head) * one_head / chip.cores


# Kernel name (in the operation's text) -> formula of (operation, shapes of its operands, chip);
# None where these do not fit.
KERNELS: dict[str, Callable[[Op, list[Shape], Chip], Work | None]] = {"splash_m": _splash}
