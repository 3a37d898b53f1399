"""Count the FLOPs of single HLO operations: matrix products and convolutions.

A multiply-add is two. The TPU compiler writes every matrix product as a convolution, with batch
dimensions as spatial ones that stride and dilate past each other, so a convolution counts the pairs
of output and kernel positions that meet an input value.
"""

import functools
import math
import re

import numpy as np

from blip3o_jax.bench.cost.hlo import Computation, Op, Shape, array

MATRIX = ("dot", "convolution")


def matrix_flops(computation: Computation, op: Op) -> int:
    """Return the FLOPs of a `dot` or a `convolution`."""
    lhs, rhs = (array(computation.by_name[name].shape) for name in op.operands[:2])
    return _dot(op, lhs) if op.opcode == "dot" else _convolution(op, lhs, rhs)


def _dot(op: Op, lhs: Shape) -> int:
    contracted = re.findall(r"\d+", op.attribute("lhs_contracting_dims") or "")
    return 2 * array(op.shape).size * math.prod(lhs.dims[int(d)] for d in contracted)


def _convolution(op: Op, lhs: Shape, rhs: Shape) -> int:
    of_lhs, of_rhs, of_out = re.split(r"_|->", op.attribute("dim_labels") or "")
    batch, features = (lhs.dims[of_lhs.index(c)] for c in "bf")
    out = array(op.shape)
    outputs = out.dims[of_out.index("f")]
    groups, batch_groups = (
        int(op.attribute(f"{name}_group_count") or 1) for name in ("feature", "batch")
    )
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", op.attribute("window") or ""))
    met = 1
    for i, c in enumerate(sorted(set(of_lhs) - set("bf"))):
        pads = window["pad"].split("x")[i] if "pad" in window else "0_0"
        number = lambda key, i=i: int(window[key].split("x")[i]) if key in window else 1
        met *= _positions(
            lhs.dims[of_lhs.index(c)],
            rhs.dims[of_rhs.index(c)],
            out.dims[of_out.index(c)],
            number("stride"),
            int(pads.split("_")[0]),
            number("lhs_dilate"),
            number("rhs_dilate"),
        )
    return 2 * (features // groups) * outputs * (batch // batch_groups) * met


@functools.cache
def _positions(
    size: int, kernel: int, output: int, stride: int, pad: int, dilate: int, kernel_dilate: int
) -> int:
    """Count the pairs of kernel and output position along one dimension that meet a value of the
    input, neither padding nor a hole.
    """
    dilated = (size - 1) * dilate + 1
    starts, met = np.arange(output) * stride - pad, 0
    for k in range(kernel):
        at = starts + k * kernel_dilate
        met += int(np.count_nonzero((at >= 0) & (at < dilated) & (at % dilate == 0)))
    return met
