"""Count the FLOPs of a traced function, and look up the peak of a device: together they give the
model FLOPs utilisation (MFU). Named scopes say what each operation's FLOPs are in proportion to,
and so how many of them are useful: spent on real tokens and images.

Counts matrix products and convolutions (2 per multiply-add), which are all but a few per cent of
any network here. Loops count once per iteration, which `cost_analysis()` of a compiled program does
not do.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from blip3o_jax.config import Config, replace_everywhere
from blip3o_jax.data.sequence import max_labels
from blip3o_jax.parallel.chips import chip_of
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.train.stages import Loss, make_loss
from blip3o_jax.train.state import plan_state
from blip3o_jax.train.train_step import make_step

_NAME = re.compile(r"\w+")  # of the scopes in a name stack


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


def _jaxpr_flops(jaxpr: Any, scopes: frozenset[str] = frozenset()) -> collections.Counter[str]:
    """Return the FLOPs of a jaxpr by their unit; `scopes` are the named scopes around it."""
    total: collections.Counter[str] = collections.Counter()
    for eqn in jaxpr.eqns:
        # Gradients keep the scopes of what they are the gradients of: transpose(jvp(ar))/...
        inside = scopes.union(_NAME.findall(str(eqn.source_info.name_stack)))
        if eqn.primitive.name == "dot_general":
            total[_unit(inside)] += _dot_flops(eqn)
        elif eqn.primitive.name == "conv_general_dilated":
            total[_unit(inside)] += _conv_flops(eqn)
        else:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            inner = [
                p
                for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
                if _is_jaxpr(p)
            ]
            counts = [_jaxpr_flops(getattr(p, "jaxpr", p), inside) for p in inner]
            if eqn.primitive.name == "cond":
                # Of the branches of a cond, count the most expensive one.
                counts = [max(counts, key=collections.Counter.total)]
            for count in counts:
                total.update({unit: times * flops for unit, flops in count.items()})
    return total


def _unit(scopes: frozenset[str]) -> str:
    """Return what the FLOPs of an operation inside these scopes are in proportion to; the units are
    those of `stages.Loss.totals`.
    """
    if "cross_entropy" in scopes:
        return "labels"
    if "ar" in scopes:
        return "pairs" if "pairs" in scopes else "tokens"
    if "references" in scopes:
        return "references"
    return "targets" if scopes & {"tokenizer", "connector", "dit", "vae"} else ""


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Return the FLOPs of one call of `fn` on arguments of these shapes (arrays or
    ShapeDtypeStructs).
    """
    return _jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr).total()


def without_recomputation(config: Config) -> Config:
    """Return the same run without rematerialization, whose FLOPs are not model FLOPs."""
    # A cross entropy in one block keeps its logits.
    loss = dataclasses.replace(config.loss, ce_chunk=max(1, config.data.max_length))
    model = replace_everywhere(config.model, remat="none")
    return dataclasses.replace(config, model=model, loss=loss)


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Hold the model FLOPs of a training step over the global batch (PaLM, arXiv 2204.02311,
    appendix B): no recomputation, and causal attention counted over the pairs it sees.

    `counted` has them by what they are in proportion to: "tokens" of rows, "pairs" of a token and
    one that it sees, "labels", "targets" (images to generate), "references"; "" for what does not
    depend on the batch. `full` is the amount of each unit in the arrays of the batch.
    """

    counted: Mapping[str, float]
    full: Mapping[str, float]

    @property
    def model(self) -> int:
        return int(sum(self.counted.values()))

    def useful(self, totals: Mapping[str, float], steps: int) -> float:
        """Return the useful model FLOPs of `steps` steps on batches with these totals.

        They are those of real tokens and images:

            sum over units u of  counted_u * totals_u / full_u

        So padding, empty slots and the diffusion of examples that generate no image are left out.
        A unit without a total counts in full.
        """
        return sum(
            flops * (totals[unit] / self.full[unit] if unit in totals else steps)
            for unit, flops in self.counted.items()
        )


def step_flops(
    config: Config, strategy: Strategy, batch: Any, loss: Callable[[Config, int], Loss] = make_loss
) -> StepFlops:
    """Count the FLOPs of a training step on a batch of these shapes.

    Counted on XLA's attention, since the FLOPs of a kernel are not visible in the jaxpr. It
    computes both products over all pairs of positions, and four more for the gradient; those above
    the diagonal are left out.
    """
    plain = without_recomputation(config)
    plain = dataclasses.replace(plain, model=replace_everywhere(plain.model, attention="xla"))
    plan = plan_state(plain, strategy)
    step = make_step(plain, plan, strategy, loss(plain, 0))
    counted: dict[str, float] = dict(_jaxpr_flops(jax.make_jaxpr(step)(plan.abstract, batch).jaxpr))
    full: dict[str, float] = {}
    if config.stage == "joint":
        rows, length = batch["tokens"].shape
        slots = batch["image_span"].size
        model = config.model
        limit = max_labels(model.template, model.tokenizer.num_tokens, slots // rows) or length
        full = {
            "tokens": rows * length,
            "pairs": rows * length * (length + 1) / 2,
            "labels": rows * min(limit, length - 1),
            "targets": slots,
            "references": slots * model.editing.reference_slots,
        }
        # Causal: a row of L tokens has L (L + 1) / 2 pairs, of the L x L that are computed.
        counted["pairs"] = counted.get("pairs", 0) * (length + 1) // (2 * length)
    return StepFlops(counted, full)


def model_flops(
    config: Config, strategy: Strategy, batch: Any, loss: Callable[[Config, int], Loss] = make_loss
) -> int:
    """Return the model FLOPs of a training step over the global batch; see `StepFlops`."""
    return step_flops(config, strategy, batch, loss).model


def peak_flops(device: jax.Device) -> float | None:
    """Return the bfloat16 peak of `device` in FLOP/s, or None without a published figure (CPUs)."""
    chip = chip_of(device.device_kind)
    return chip.flops if chip else None
