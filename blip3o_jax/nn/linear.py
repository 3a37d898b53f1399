"""Apply a dense layer, with optional LoRA factors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax.config import LoraConfig
from blip3o_jax.nn.parameters import fan_in, param, zeros


class Linear(nnx.Module):
    """Compute y = x @ kernel + bias over the last dimension.

    Matches `torch.nn.Linear` with the kernel transposed to [in, out]. With `lora`,
    y += alpha / rank (x @ lora_a) @ lora_b (arXiv 2106.09685). The factors are initialised from the
    random stream "lora", so that the other parameters have the same initial values with and without
    LoRA.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        axes: tuple[str | None, str | None],
        *,
        rngs: nnx.Rngs,
        bias: bool = True,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        init: Callable | None = None,
        lora: LoraConfig | None = None,
    ):
        self.kernel = param(rngs, (d_in, d_out), axes, init or fan_in(), param_dtype)
        self.bias = param(rngs, (d_out,), (axes[1],), zeros, param_dtype) if bias else None
        self.lora_a = (
            param(rngs, (d_in, lora.rank), (axes[0], None), fan_in(), stream="lora")
            if lora
            else None
        )
        # B starts at zero, so that the adapted layer first computes what the layer without LoRA
        # does.
        self.lora_b = (
            param(rngs, (lora.rank, d_out), (None, axes[1]), zeros, stream="lora") if lora else None
        )
        self.lora_scale = lora.scale if lora else 0.0
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        y = _matmul(x, self.kernel[...].astype(self.dtype))
        if self.lora_a is not None and self.lora_b is not None:
            # The scale multiplies the rank-r product, the smallest of the arrays involved.
            low = _matmul(x, self.lora_a[...].astype(self.dtype)) * self.lora_scale
            y += _matmul(low, self.lora_b[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


# JAX computes the kernel's gradient as the transpose of dy^T x. XLA folds the transpose into a
# layout on accelerators, but on CPUs copies both dy and the gradient; x^T dy copies x alone.
# Reverse mode only. With symbolic zeros, a frozen kernel has no gradient computed and no residual.
@jax.custom_vjp
def _matmul(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return x @ kernel_IO


def _matmul_fwd(
    x: Any, kernel_IO: Any
) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
    saved = x.value if kernel_IO.perturbed else None, kernel_IO.value if x.perturbed else None
    return x.value @ kernel_IO.value, saved


def _matmul_bwd(
    saved: tuple[jax.Array | None, jax.Array | None], dy: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    x, kernel_IO = saved
    # Neither product is computed for an input without a gradient: `_matmul_fwd` saved no residual
    # for it.
    dx = None if kernel_IO is None else dy @ kernel_IO.T
    return dx, None if x is None else jnp.einsum("...i,...o->io", x, dy)


_matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)
