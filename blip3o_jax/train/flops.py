"""Count the FLOPs of a traced function, and look up the peak of a device: together they give the
model FLOPs utilisation (MFU).

Counts matrix products and convolutions (2 per multiply-add), which are all but a few per cent of
any network here. Loops count once per iteration, which `cost_analysis()` of a compiled program does
not do.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from blip3o_jax.config import Config, replace_everywhere
from blip3o_jax.parallel.chips import chip_of
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.part_registry import family_of, resolve, settings_of
from blip3o_jax.train.stages import Loss, make_loss, stage_parts
from blip3o_jax.train.state import plan_state
from blip3o_jax.train.train_step import make_step


def _dot_flops(eqn: Any) -> int:
    (contract, _), (batch, _) = eqn.params["dimension_numbers"]
    lhs, rhs = (v.aval.shape for v in eqn.invars)
    # Contracted and batch dimensions occur in both factors, the others in one.
    shared = math.prod(lhs[d] for d in contract) * math.prod(lhs[d] for d in batch)
    return 2 * shared * (math.prod(lhs) // shared) * (math.prod(rhs) // shared)


def _conv_flops(eqn: Any) -> int:
    kernel = eqn.invars[1].aval.shape
    out_channels = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    # Each output value is one dot product over the kernel's window and input channels, which are
    # those of one group.
    window = math.prod(kernel) // out_channels
    return 2 * math.prod(eqn.outvars[0].aval.shape) * window


def _jaxpr_flops(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total += _dot_flops(eqn)
        elif eqn.primitive.name == "conv_general_dilated":
            total += _conv_flops(eqn)
        else:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            inner = [
                p
                for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
                if _is_jaxpr(p)
            ]
            counts = [_jaxpr_flops(getattr(p, "jaxpr", p)) for p in inner]
            # Of the branches of a cond, count the most expensive one.
            total += times * (
                max(counts, default=0) if eqn.primitive.name == "cond" else sum(counts)
            )
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Return the FLOPs of one call of `fn` on arguments of these shapes (arrays or
    ShapeDtypeStructs).
    """
    return _jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def without_recomputation(config: Config) -> Config:
    """Return the same run without rematerialization, whose FLOPs are not model FLOPs."""
    # A cross entropy in one block keeps its logits.
    loss = dataclasses.replace(config.loss, ce_chunk=config.data.max_length)
    model = replace_everywhere(config.model, remat="none")
    return dataclasses.replace(config, model=model, loss=loss)


def model_flops(
    config: Config, strategy: Strategy, batch: Any, loss: Callable[[Config, int], Loss] = make_loss
) -> int:
    """Return the model FLOPs of a training step over the global batch (PaLM, arXiv 2204.02311,
    appendix B): no recomputation, and causal attention counted over the pairs it uses.

    Counted on XLA's attention, since the FLOPs of a kernel are not visible in the jaxpr. It
    computes both products over all pairs of positions, and four more for the gradient; the pairs
    above the diagonal are subtracted.
    """
    plain = without_recomputation(config)
    plain = dataclasses.replace(plain, model=replace_everywhere(plain.model, attention="xla"))
    plan = plan_state(plain, strategy)
    counted = count_flops(make_step(plain, plan, strategy, loss(plain, 0)), plan.abstract, batch)
    for part in stage_parts(config):
        if unused := family_of(part, plain.model).unused_flops:
            one = resolve(unused)(settings_of(part, plain.model), *batch["tokens"].shape)
            # Two products, and four more for the gradient, which a frozen part has not.
            counted -= one * (6 if part in plan.abstract["params"] else 2)
    return counted


def peak_flops(device: jax.Device) -> float | None:
    """Return the bfloat16 peak of `device` in FLOP/s, or None without a published figure (CPUs)."""
    chip = chip_of(device.device_kind)
    return chip.flops if chip else None
