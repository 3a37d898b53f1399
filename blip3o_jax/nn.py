"""Building blocks that every network here is made of: parameters and activations with *logical*
axis names.

A logical axis ("embed", "heads", "batch", ...) says what a dimension means; a strategy
(parallel/rules.py) says on which mesh axes it lies. Networks declare the former here and never name
the latter.

Shape suffixes: B batch, L length, D features, H height, W width, C channels.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip3o_jax.config import LoraConfig
from blip3o_jax.convolution import conv2d, upsampled_conv2d

# A resolver answers, for (part, logical names, shape), with a sharding or None for "leave it to the
# compiler".
Resolver = Callable[
    [str, tuple[str | None, ...], tuple[int, ...]], jax.sharding.NamedSharding | None
]

_resolver: contextvars.ContextVar[Resolver | None] = contextvars.ContextVar(
    "resolver", default=None
)
_part: contextvars.ContextVar[str] = contextvars.ContextVar("part", default="")


@contextlib.contextmanager
def sharding_resolver(resolver: Resolver | None) -> Iterator[None]:
    """While active, `constrain` asks `resolver` where activations lie."""
    token = _resolver.set(resolver)
    try:
        yield
    finally:
        _resolver.reset(token)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Name the part of the model being traced ("ar", "dit", ...): each part has its own sharding
    table and scope.
    """
    token = _part.set(name)
    try:
        with jax.named_scope(name):
            yield
    finally:
        _part.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin activation `x` to its place: one logical name (or None) per dimension. A no-op when no
    strategy is active.
    """
    if len(axes) != x.ndim:
        raise ValueError(
            f"constrain: {len(axes)} axis names {axes} for an array of shape {x.shape}"
        )
    at = sharding(*axes, shape=x.shape)
    return x if at is None else jax.lax.with_sharding_constraint(x, at)


def sharding(*axes: str | None, shape: tuple[int, ...]) -> jax.sharding.NamedSharding | None:
    """Where an activation of the part being traced lies; None when no strategy is active."""
    resolver = _resolver.get()
    return resolver(_part.get(), axes, shape) if resolver else None


def mesh() -> jax.sharding.Mesh | None:
    """The mesh that this is traced for."""
    anywhere = sharding(shape=())
    return None if anywhere is None else anywhere.mesh


def platform() -> str:
    """What this is traced for: "cpu", "gpu" or "tpu"; also where that is not the machine it is
    traced on.
    """
    return jax.default_backend() if mesh() is None else mesh().devices.flat[0].platform


def shards(axis: str) -> int:
    """Pieces that a logical axis of the part being traced is cut into."""
    at = sharding(axis, shape=(0,))  # 0 divides over anything
    names = () if at is None or not at.spec or at.spec[0] is None else at.spec[0]
    return math.prod(
        at.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names)
    )


def normal(stddev: float) -> Callable:
    return jax.nn.initializers.normal(stddev)


def fan_in() -> Callable:
    """Variance 1 / fan-in over every dimension but the last; the default for kernels."""
    return jax.nn.initializers.lecun_normal()


zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def param(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str | None],
    init: Callable,
    dtype: Any = jnp.float32,
    stream: str = "params",
) -> nnx.Param:
    """A parameter with one logical axis name (or None) per dimension, kept as `Param.axes`; drawn
    from `stream` of `rngs`.
    """
    if len(shape) != len(axes):
        raise ValueError(
            f"param: shape {tuple(shape)} has {len(shape)} dimensions, axes {tuple(axes)} name {len(axes)}"
        )
    return nnx.Param(
        init(_next_key(rngs[stream]), tuple(shape), jnp.dtype(dtype)), axes=tuple(axes)
    )


def _next_key(stream: nnx.RngStream) -> jax.Array:
    """Return the key that calling `stream` would return, and count it.

    The call itself does `count[...] += 1`, for which Flax asks the traced count for its sharding.
    JAX answers with an error, dropped by Flax, whose message walks through all that has been traced
    so far: tracing a model's parameters would take time that grows with the square of their number.
    """
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    stream.count.set_value(stream.count[...] + 1)
    return key


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


class Conv(nnx.Module):
    """2-D convolution on NHWC, kernel [kh, kw, in / groups, out]; `torch.nn.Conv2d` transposed from
    [out, in, kh, kw].

    `padding` is the symmetric padding in pixels, as in torch.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: int,
        *,
        rngs: nnx.Rngs,
        axes: tuple[str | None, str | None] = ("conv_in", "conv_out"),
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = True,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        init: Callable | None = None,
    ):
        shape = (kernel_size, kernel_size, c_in // groups, c_out)
        self.kernel = param(rngs, shape, (None, None, *axes), init or fan_in(), param_dtype)
        self.bias = param(rngs, (c_out,), (axes[1],), zeros, param_dtype) if bias else None
        self.stride, self.padding, self.groups = stride, padding, groups
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        y_BHWC = conv2d(
            x_BHWC.astype(self.dtype),
            kernel,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
        )
        return y_BHWC if self.bias is None else y_BHWC + self.bias[...].astype(self.dtype)

    def upsampled(self, x_BHWC: jax.Array) -> jax.Array:
        """What the layer makes of `x_BHWC` with every pixel as a square of 2 x 2; for 3 x 3 kernels
        with padding 1 alone.
        """
        y_BHWC = upsampled_conv2d(x_BHWC.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y_BHWC if self.bias is None else y_BHWC + self.bias[...].astype(self.dtype)


class DepthwiseConv(nnx.Module):
    """Depthwise 2-D convolution on NHWC that keeps H x W; `torch.nn.Conv2d(C, C, k, padding=k // 2,
    groups=C)`, its kernel transposed from [C, 1, k, k] to [k, k, 1, C].

    `Conv` with as many groups as channels does the same; see convolution.py for the form it takes
    where.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        rngs: nnx.Rngs,
        axis: str | None = "conv_out",
        bias: bool = True,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        init: Callable | None = None,
    ):
        if kernel_size % 2 == 0:
            raise ValueError(
                f"DepthwiseConv: kernel_size={kernel_size} must be odd, so that the size stays the same"
            )
        shape = (kernel_size, kernel_size, 1, channels)
        self.kernel = param(rngs, shape, (None, None, None, axis), init or fan_in(), param_dtype)
        self.bias = param(rngs, (channels,), (axis,), zeros, param_dtype) if bias else None
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        padding, groups = kernel.shape[0] // 2, kernel.shape[-1]
        y_BHWC = conv2d(x_BHWC.astype(self.dtype), kernel, padding=padding, groups=groups)
        return y_BHWC if self.bias is None else y_BHWC + self.bias[...].astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (+ bias) over the last dimension, the statistics in float32 whatever the
    compute dtype, since bfloat16 has too few bits to add up squares. Matches `Qwen3RMSNorm` and
    diffusers' `RMSNorm`.
    """

    def __init__(
        self,
        dim: int,
        *,
        rngs: nnx.Rngs,
        eps: float,
        bias: bool = False,
        param_dtype: Any = jnp.float32,
        init: Callable = ones,
        axes: tuple[str | None] = ("norm",),
    ):
        self.scale = param(rngs, (dim,), axes, init, param_dtype)
        self.bias = param(rngs, (dim,), axes, zeros, param_dtype) if bias else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x_f32 = x.astype(jnp.float32)
        y = (x_f32 * jax.lax.rsqrt(jnp.mean(x_f32**2, axis=-1, keepdims=True) + self.eps)).astype(
            x.dtype
        )
        y = y * self.scale[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def standardise(x: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / std over the last dimension, statistics in float32: `torch.nn.LayerNorm` without
    weights.
    """
    x_f32 = x.astype(jnp.float32)
    mean = jnp.mean(x_f32, axis=-1, keepdims=True)
    var = jnp.mean((x_f32 - mean) ** 2, axis=-1, keepdims=True)
    return ((x_f32 - mean) * jax.lax.rsqrt(var + eps)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`torch.nn.LayerNorm` with weight and bias."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs, eps: float, param_dtype: Any = jnp.float32):
        self.scale = param(rngs, (dim,), ("norm",), ones, param_dtype)
        self.bias = param(rngs, (dim,), ("norm",), zeros, param_dtype)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return standardise(x, self.eps) * self.scale[...].astype(x.dtype) + self.bias[...].astype(
            x.dtype
        )


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers as one module whose parameters lead with a "layers" axis; run it with `scan`."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    module = build(rngs)
    for leaf in jax.tree.leaves(nnx.state(module), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        leaf.set_metadata(axes=("layers", *leaf.axes))
    variables = nnx.state(module)
    nnx.update(module, variables)
    return module


def unstack(layers: nnx.Module) -> list[nnx.Module]:
    """The layers of a stack as modules of their own.

    For loops that run a stack many times over, with its own loop laid out: taken apart before such
    a loop the weights are copied once. XLA's CPU compiler would copy every slice of a stack anew at
    each turn.
    """
    graphdef, state = nnx.split(layers)
    count = len(jax.tree.leaves(state)[0])
    return [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(count)]


# What an attention kernel calls its results (jax.ad_checkpoint), for a policy to keep: to it the
# kernel is no product.
ATTENTION = "attention"

REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
        jax.checkpoint_policies.save_only_these_names(ATTENTION),
    ),
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["carry"], meta_fields=["part", "name", "index"]
)
@dataclasses.dataclass(frozen=True)
class LayerCarry:
    """What one layer of a stack handed to the next: the part being traced, the layer's class, its
    index in the stack.
    """

    part: str
    name: str
    index: int
    carry: Any


_records: contextvars.ContextVar[list[LayerCarry] | None] = contextvars.ContextVar(
    "records", default=None
)


@contextlib.contextmanager
def record_layers() -> Iterator[list[LayerCarry]]:
    """While active, `scan` lays its loop out and appends every layer's carry to the list that this
    yields, stack after stack.

    Inside a function that is jitted, the context must be entered there too, and the list be among
    what it returns:

        @jax.jit
        def layers(x):
            with nn.record_layers() as carries:
                model(x)
            return carries

    A `scan` within the body of another loop or transformation cannot be recorded: its carries mean
    nothing outside.
    """
    token = _records.set([])
    try:
        yield _records.get()
    finally:
        _records.reset(token)


def scan(
    layers: nnx.Module,
    step: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    remat: str,
    unroll: bool,
) -> tuple[Any, Any]:
    """Run stacked `layers` in order: carry, y = step(layer, carry, x) for each, with `xs` sliced
    and `ys` stacked.

    One layer is traced and compiled whatever the depth, unless `unroll` lays the loop out: XLA's
    CPU compiler makes a small model up to twice as fast that way. `remat` names what the backward
    pass keeps (REMAT_POLICIES).
    """
    graphdef, state = nnx.split(layers)

    def body(carry: Any, inputs: tuple[Any, Any]) -> tuple[Any, Any]:
        layer_state, x = inputs
        return step(nnx.merge(graphdef, layer_state), carry, x)

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=unroll)
    if (records := _records.get()) is None:
        return jax.lax.scan(body, carry, (state, xs), unroll=unroll)
    ys = []
    for index in range(len(jax.tree.leaves(state)[0])):
        carry, y = body(carry, jax.tree.map(lambda x, i=index: x[i], (state, xs)))
        records.append(LayerCarry(_part.get(), type(layers).__name__, index, carry))
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def sinusoids(length: int, dim: int) -> jax.Array:
    """Positions [L, D] of "Attention is all you need" (arXiv 1706.03762, section 3.5), sines then
    cosines.
    """
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(dim // 2) / (dim // 2))
    return jnp.asarray(
        np.pad(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), ((0, 0), (0, dim % 2))),
        jnp.float32,
    )
