"""Apply a dense layer, with LoRA factors where the configuration asks for them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax.config import LoraConfig
from blip3o_jax.nn.parameters import fan_in, param, zeros


class Linear(nnx.Module):
    """y = x @ kernel + bias over the last dimension; `torch.nn.Linear` with the kernel transposed
    to [in, out].

    With `lora` (LoraConfig), y += alpha / rank (x @ lora_a) @ lora_b. The factors come from a
    stream of their own, so that the other parameters are drawn as they would be without.
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
        self.lora_b = (
            param(rngs, (lora.rank, d_out), (None, axes[1]), zeros, stream="lora") if lora else None
        )
        self.lora_scale = lora.scale if lora else 0.0
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        y = _matmul(x, self.kernel[...].astype(self.dtype))
        if self.lora_a is not None:
            low = _matmul(x, self.lora_a[...].astype(self.dtype)) * self.lora_scale
            y += _matmul(low, self.lora_b[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


# JAX states the kernel's gradient as the transpose of dy^T x. Compilers for accelerators fold that
# into a layout; XLA's for CPUs copies both dy and the gradient. x^T dy needs a copy of x alone.
# Reverse mode only; what is not differentiated, such as a frozen kernel, costs nothing.
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
    dx = None if kernel_IO is None else dy @ kernel_IO.T
    return dx, None if x is None else jnp.einsum("...i,...o->io", x, dy)


_matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)
