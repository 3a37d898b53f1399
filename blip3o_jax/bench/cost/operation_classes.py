"""List the opcodes and custom calls whose cost is known without looking into them.

Matrix operations are in hlo_flops.py, collectives in network.py, kernels in kernels.py.
"""

import re


def _names(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\S+", text))


# Cost nothing: names for what is there already, or marks for the compiler.
FREE = _names("""
    parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id opt-barrier
    domain add-dependency get-dimension-size async-update
""")
# Read and write memory and hardly compute.
MEMORY = _names("""
    abs add and atan2 broadcast bitcast-convert cbrt ceil clamp compare complex concatenate convert
    copy cosine count-leading-zeros divide dynamic-slice dynamic-update-slice erf exponential
    exponential-minus-one floor gather imag iota is-finite log log-plus-one logistic map maximum
    minimum multiply negate not or pad popcnt power real reduce reduce-precision reduce-window
    remainder reshape reverse rng rng-bit-generator rng-get-and-update-state round-nearest-afz
    round-nearest-even rsqrt scatter select select-and-scatter shift-left shift-right-arithmetic
    shift-right-logical sign sine slice sort sqrt stochastic-convert subtract tan tanh topk
    transpose xor
""")
# Custom calls of the compiler's own: those that only name memory, and those that move what their
# shapes say.
FREE_CALLS = _names("""
    AllocateBuffer AssumeGatherIndicesInBound ConcatBitcast Sharding SPMDFullToShardShape
    SPMDShardToFullShape annotate_device_placement
""")
MEMORY_CALLS = _names("MoveToHost MoveToDevice PartialReduce ResizeBuffer TopK")
