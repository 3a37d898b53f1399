"""Run splash attention on each shard: block-sparse flash attention, a Pallas kernel for TPUs.

The kernel is in `jax.experimental.pallas.ops.tpu`. Scores stay in on-chip memory, and blocks above
the diagonal are not computed. Heads and the queries of a row may be sharded; the keys and values of
a row are not. On other platforms, where `attend` raises, the kernel is interpreted, for tests.

B batch, L tokens, H query heads, G key/value heads, K head size. Length is padded to whole tiles,
as segment 0.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax import nn

LANES = 128  # lanes of a TPU's vector registers; block sizes are multiples
LARGEST_BLOCK = 512


def splash(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    query_segments_BL: jax.Array,
    key_segments_BL: jax.Array,
    query_start: jax.Array | int,
) -> jax.Array:
    """Compute `attention.attend` for the queries of whole rows, or of their ends.

    Raises ValueError for a cache with slots after the queries.
    """
    length = k_BLGK.shape[1]
    scale = q_BLHK.shape[-1] ** -0.5
    if not isinstance(query_start, int) or query_start + q_BLHK.shape[1] != length:
        raise ValueError("splash attention is for whole rows: set attention 'xla' for a cache")
    if query_start:  # the kernel's mask is of whole rows: pad the queries in front with segment 0
        front = lambda x: jnp.pad(x, ((0, 0), (query_start, 0), *((0, 0),) * (x.ndim - 2)))
        o_BLHK = splash(front(q_BLHK), k_BLGK, v_BLGK, front(query_segments_BL), key_segments_BL, 0)
        return o_BLHK[:, query_start:]
    rows_at, length_at, heads_at, _ = _at("batch", "length", "act_heads", None, shape=q_BLHK.shape)
    kv_heads_at = _at("act_kv_heads", shape=k_BLGK.shape[2:3])[0]
    mesh, head_shards, length_shards = nn.mesh(), nn.shards("act_heads"), nn.shards("length")
    # Every shard of the queries must be whole tiles of 128, the kernel's smallest block.
    pad = -length % (LANES * length_shards)
    widen = lambda x: jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
    by_head = lambda x: widen(x).transpose(0, 2, 1, 3)
    # The kernel does not scale scores. Scaling q in bfloat16 rounds it again, unless 1 / sqrt(K) is
    # a power of two.
    q_BHLK = by_head(q_BLHK * jnp.asarray(scale, q_BLHK.dtype))
    inputs = (
        q_BHLK,
        by_head(k_BLGK),
        by_head(v_BLGK),
        widen(query_segments_BL),
        widen(key_segments_BL),
    )

    interpreted = nn.platform() != "tpu"
    kernel = _kernel(q_BHLK.shape[1], length + pad, head_shards, length_shards, interpreted)
    if mesh is None:
        o_BHLK = _rows(kernel, *inputs)
    else:
        at = PartitionSpec
        kernel_at = kernel.manual_sharding_spec(NamedSharding(mesh, at(heads_at, length_at)))
        keys_at = at(rows_at, kv_heads_at, None, None)
        queries_at = at(rows_at, heads_at, length_at, None)
        in_specs = (
            kernel_at,
            queries_at,
            keys_at,
            keys_at,
            at(rows_at, length_at),
            at(rows_at, None),
        )
        # The kernel's outputs carry no varying axes, which `check_vma` requires.
        run = jax.shard_map(
            _rows, mesh=mesh, in_specs=in_specs, out_specs=queries_at, check_vma=False
        )
        o_BHLK = run(kernel, *inputs)
    return o_BHLK.transpose(0, 2, 1, 3)[:, :length]


def _rows(
    kernel: kernels.SplashAttentionKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *segments: jax.Array,
) -> jax.Array:
    run = jax.vmap(lambda q, k, v, *ids: kernel(q, k, v, segment_ids=kernels.SegmentIds(*ids)))
    # A kernel without `save_residuals` returns the output alone.
    return cast("jax.Array", run(q, k, v, *segments))


def _kernel(
    heads: int, length: int, head_shards: int, length_shards: int, interpret: bool
) -> kernels.SplashAttentionKernel:
    tiles = length // length_shards // LANES
    # The largest block that divides the padded length: fewer, larger blocks have less overhead a
    # FLOP.
    block = LANES * max(n for n in range(1, LARGEST_BLOCK // LANES + 1) if tiles % n == 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        # One backward kernel computes dq, dk and dv, so that the scores are recomputed once.
        use_fused_bwd_kernel=True,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    return kernels.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=head_shards,
        q_seq_shards=length_shards,
        # Remat policies store the kernel's results by this name (nn/remat.py).
        residual_checkpoint_name=nn.ATTENTION,
        interpret=interpret,
    )


def _at(*axes: str | None, shape: tuple[int, ...]) -> tuple[str | tuple[str, ...] | None, ...]:
    """Return the mesh axes of each dimension."""
    sharding = nn.sharding(*axes, shape=shape)
    if sharding is None:
        return (None,) * len(axes)
    return (*sharding.spec, *(None,) * (len(axes) - len(sharding.spec)))
