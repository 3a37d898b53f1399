"""Define the anchors: published training steps of decoder-only language models on TPUs.

Differences from all published runs: MaxText's networks have other blocks. A MaxText block that runs
attention and a two-matrix MLP in parallel is here attention, then an MLP of three matrices of two
thirds the width, with as many parameters and FLOPs; queries and keys have a norm for each head
here; attention blocks are of 512 instead of 1024 or 2048. Each anchor names its further
differences.
"""

import dataclasses
import functools
from typing import Any

from blip3o_jax.config import MeshConfig, Qwen3Config

V5E = "AI-Hypercomputer/maxtext src/maxtext/configs/tpu/v5e/README.md"
V5P = "AI-Hypercomputer/maxtext src/maxtext/configs/tpu/v5p/README.md"
TRILLIUM = "AI-Hypercomputer/tpu-recipes training/trillium"
IRONWOOD = "AI-Hypercomputer/tpu-recipes training/ironwood/README.md"
TIERS = "maxtext.readthedocs.io reference/models/tiering"

# The compiler's flags of the published runs, as their scripts set them. Left out: what hands
# collectives to the sparse cores, and the scheduler's flags of offloading, with which this compiler
# takes more than ten times as long.
GATHERS = (
    "--xla_enable_async_all_gather=true --xla_tpu_overlap_compute_collective_tc=true"
    " --xla_tpu_enable_async_collective_fusion=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
    " --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
)
V5E_FLAGS = (
    f"{GATHERS} --xla_tpu_enable_data_parallel_all_reduce_opt=true"
    " --xla_tpu_data_parallel_opt_different_sized_ops=true"
)
V5P_FLAGS = (
    f"{V5E_FLAGS} --xla_tpu_megacore_fusion_allow_ags=false "
    "--xla_enable_async_collective_permute=true"
    " --xla_tpu_enable_ag_backward_pipelining=true"
)
V6E_FLAGS = (
    f"{V5E_FLAGS} --xla_tpu_scoped_vmem_limit_kib=98304 "
    "--xla_tpu_use_minor_sharding_for_major_trivial_input=true"
    " --xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1 "
    "--xla_tpu_assign_all_reduce_scatter_layout=true"
    " --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
)
TPU7X_FLAGS = "--xla_tpu_scoped_vmem_limit_kib=61440 --xla_tpu_bf16_emission_mode=NATIVE_EMISSION"


@dataclasses.dataclass(frozen=True)
class Anchor:
    """Describe a published step with `rows` of `length` tokens a device; `seconds` as published, or
    computed from the published FLOP/s and FLOPs."""

    name: str
    topology: str
    ar: Qwen3Config
    rows: int
    length: int
    seconds: float
    source: str
    differs: str = ""  # from the published run, in addition to the module's list
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1, strategy="fsdp")
    keep: str = (
        ""  # what the backward pass keeps where none of nn.REMAT_POLICIES says it, a name of KEEP
    )
    flags: str = ""  # the compiler's, in place of the launchers'


def _maxtext(layers: int, width: int, mlp: int, heads: int, **other: Any) -> Qwen3Config:
    """Return sizes of MaxText's own family of December 2023: heads of 256, an MLP of two matrices
    in parallel with attention, 32768 tokens, tied embeddings."""
    return Qwen3Config(
        vocab_size=32768,
        num_hidden_layers=layers,
        hidden_size=width,
        # Of 32768 that is 21504: two thirds, 21845, down to a product of small factors, for 172
        # tiles of 128 do not go into the compiler's windows and would cost a third more. The step
        # has 1 % fewer FLOPs for it.
        intermediate_size=mlp * 21 // 32,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=256,
        tie_word_embeddings=True,
        **other,
    )


def _llama(
    layers: int, width: int, mlp: int, heads: int, vocabulary: int, **other: Any
) -> Qwen3Config:
    """Return sizes of Llama 3.1, Mistral 7B and Llama 2 70B: eight key/value heads of 128, SwiGLU,
    an untied head."""
    return Qwen3Config(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        **other,
    )


def _v5e(name: str, layers: int, width: int, rows: int, seconds: float, tflops: int) -> Anchor:
    """Return a step of MaxText's own family on 256 chips of v5e, as its README lists them."""
    return Anchor(
        name,
        "v5e:16x16",
        _maxtext(layers, width, 32768, 32),
        rows=rows,
        length=2048,
        seconds=seconds,
        source=f"{V5E}: {tflops} TFLOP/s a chip",
        flags=V5E_FLAGS,
    )


def _trillium(
    name: str, topology: str, vocabulary: int, rows: int, seconds: float, recipe: str
) -> Anchor:
    """Return a step of Llama 3.1 8B or Mistral 7B, which differ in the vocabulary, on v6e."""
    return Anchor(
        name,
        topology,
        _llama(32, 4096, 14336, 32, vocabulary, remat="offload"),
        rows=rows,
        length=8192,
        seconds=seconds,
        source=f"{TRILLIUM}/{recipe}",
        keep="narrow products on the host",
        flags=V6E_FLAGS,
        differs="layer inputs stay on the device, where the recipe offloads them with the "
        "attention's products",
    )


LLAMA_70B = functools.partial(_llama, 80, 8192, 28672, 64)

ANCHORS = (
    Anchor(
        "32b-v5p-64",
        "v5p:4x4x4",
        _maxtext(32, 10240, 32768, 32, remat="dots"),
        rows=6,
        length=2048,
        seconds=7.44,
        source=f"{V5P}: 328 TFLOP/s a chip; 32b.sh has a batch of 6 a chip (8 in December 2023)",
        flags=V5P_FLAGS,
        differs="FSDP over all chips, not 16 x TP 4, whose activations would not fit: tensor "
        "parallelism here leaves the stream between layers whole on each device",
    ),
    _v5e("16b-v5e-256", layers=32, width=5120, rows=6, seconds=10.33, tflops=120),
    _v5e("32b-v5e-256", layers=32, width=10240, rows=4, seconds=12.32, tflops=132),
    _v5e("64b-v5e-256", layers=64, width=10240, rows=2, seconds=13.71, tflops=118),
    Anchor(
        "llama2-70b-v5p-256",
        "v5p:4x8x8",
        LLAMA_70B(32000),
        rows=4,
        length=4096,
        seconds=23.68,
        source=f"{TIERS}: 692 tokens/s a chip; the recipe's script is for v5p-512, which is 256 "
        "chips",
        keep="narrow products",
        flags=V5P_FLAGS,
    ),
    _trillium(
        "llama3.1-8b-v6e-8",
        "v6e:2x4",
        vocabulary=128256,
        rows=3,
        seconds=3.443,
        recipe="Llama3.1-8B-MaxText/v6e-8",
    ),
    _trillium(
        "llama3.1-8b-v6e-256",
        "v6e:16x16",
        vocabulary=128256,
        rows=4,
        seconds=4.546,
        recipe="Llama3.1-8B-MaxText/v6e-256",
    ),
    _trillium(
        "mistral-7b-v6e-8",
        "v6e:2x4",
        vocabulary=32000,
        rows=6,
        seconds=6.320,
        recipe="Mistral-7B-MaxText",
    ),
    Anchor(
        "llama3.1-70b-tpu7x-64",
        "tpu7x:4x4x4",
        LLAMA_70B(128256),
        rows=2,
        length=8192,
        seconds=12.20,
        source=f"{IRONWOOD}: 64 chips, bf16",
        keep="attention",
        differs="the recipe keeps queries, keys and values too, which are computed again here: 2 % "
        "more FLOPs",
        flags=TPU7X_FLAGS,
    ),
)
