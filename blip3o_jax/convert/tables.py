"""Map PyTorch tensors to this package's parameters, with one table for each family of a part.

Import and export read the same tables; conversions.py assigns them to the families.

A rule pairs the name of a tensor in the stock class (without the prefix it has in a BLIP3o-NEXT
directory) with the path of a parameter in the part of that name. In a name, `{i}` is the number of
a layer whose parameters are stacked here. A path may be several: the tensor then holds these
parameters one after the other along its first dimension.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from blip3o_jax.config import DcAeConfig, QwenConfig, SanaConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Hold the conversions of one tensor's layout between PyTorch and this package."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]
    torch_shape: Callable[[Shape], Shape]  # of a parameter's shape, without the axis of the layers


def _patch_to_torch(kernel: np.ndarray) -> np.ndarray:
    side = math.isqrt(kernel.shape[0] // 3)
    # Rows are flattened in the order row, column, channel (image_tokens/siglip2.py).
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


LAYOUTS = {
    "same": Layout(lambda w: w, lambda w: w, lambda s: s),
    # [out, in] and [in, out]
    "linear": Layout(lambda w: w.T, lambda w: w.T, lambda s: s[::-1]),
    # [out, in, height, width] and [height, width, in, out]
    "conv": Layout(
        lambda w: w.transpose(2, 3, 1, 0),
        lambda w: w.transpose(3, 2, 0, 1),
        lambda s: (s[3], s[2], s[0], s[1]),
    ),
    # [out, in, 1, 1] and [in, out]
    "conv1x1": Layout(
        lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None], lambda s: (s[1], s[0], 1, 1)
    ),
    # [out, 3, patch, patch] and [patch * patch * 3, out]
    "patch": Layout(
        lambda w: w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]),
        _patch_to_torch,
        lambda s: (s[1], 3, math.isqrt(s[0] // 3), math.isqrt(s[0] // 3)),
    ),
    # [1, 1, width] and [width]
    "probe": Layout(lambda w: w.reshape(-1), lambda w: w.reshape(1, 1, -1), lambda s: (1, 1, *s)),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Map the tensors of a name pattern to parameters.

    `torch` is the pattern, `paths` are the parameters', and `layer_offset` is the value of
    `{i}` for layer 0. `vocabulary` marks a tensor whose first dimension is the vocabulary, which
    this package pads.
    """

    torch: str
    paths: tuple[str, ...]
    layout: str = "same"
    layer_offset: int = 0
    vocabulary: bool = False

    @property
    def stacked(self) -> bool:
        return "{i}" in self.torch

    @property
    def by_rows(self) -> bool:
        """Return whether the tensor can be converted a few rows at a time.

        Its rows are then rows, or columns (`transposed`), of one parameter.
        """
        # A stack's layers and a fused tensor's parts are pieces of several arrays, and a
        # convolution's rows are not rows of its kernel.
        return self.layout in ("same", "linear") and len(self.paths) == 1 and not self.stacked

    @property
    def transposed(self) -> bool:
        return self.layout == "linear"

    def key(self, layer: int) -> str:
        """Return the tensor's name for a layer here."""
        return self.torch.replace("{i}", str(layer + self.layer_offset))


# The parts of the published BLIP3o-NEXT, in the order of the data flow; editing models have more.
PUBLISHED_PARTS = ("tokenizer", "ar", "connector", "dit", "vae")
# All parts with a conversion, in the order of the tensors of a BLIP3o-NEXT directory.
CONVERTED_PARTS = (
    "tokenizer",
    "ar",
    "connector",
    "latent_connector",
    "feature_connector",
    "dit",
    "vae",
)
HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"


def linear(
    torch: str, path: str, layout: str = "linear", *, bias: bool = True, layer_offset: int = 0
) -> list[Rule]:
    """Return the rules of a linear layer: weight, and bias where there is one."""
    weight = Rule(f"{torch}.weight", (f"{path}/kernel",), layout, layer_offset)
    return (
        [weight, Rule(f"{torch}.bias", (f"{path}/bias",), layer_offset=layer_offset)]
        if bias
        else [weight]
    )


def norm(torch: str, path: str, *, bias: bool = False, layer_offset: int = 0) -> list[Rule]:
    scale = Rule(f"{torch}.weight", (f"{path}/scale",), layer_offset=layer_offset)
    return (
        [scale, Rule(f"{torch}.bias", (f"{path}/bias",), layer_offset=layer_offset)]
        if bias
        else [scale]
    )


def prefixed(torch: str, path: str, table: list[Rule], *, layer_offset: int = 0) -> list[Rule]:
    return [
        dataclasses.replace(
            rule,
            torch=torch + rule.torch,
            paths=tuple(path + p for p in rule.paths),
            layer_offset=layer_offset,
        )
        for rule in table
    ]


def qwen3(cfg: QwenConfig) -> list[Rule]:
    """Return the rules of `transformers.Qwen3ForCausalLM`."""
    layer, here = "model.layers.{i}.self_attn.", "layers/attention/"
    norms = [rule for n in ("q_norm", "k_norm") for rule in norm(layer + n, here + n)]
    return _decoder(cfg, biases="", norms=norms)


def qwen2(cfg: QwenConfig) -> list[Rule]:
    """Return the rules of `transformers.Qwen2ForCausalLM`."""
    return _decoder(cfg, biases="qkv", norms=[])


def _decoder(cfg: QwenConfig, biases: str, norms: list[Rule]) -> list[Rule]:
    """Return the rules of a Qwen decoder.

    The projections named in `biases` have a bias; `norms` are those within attention.
    """
    layer, here = "model.layers.{i}.", "layers/"
    table = [
        Rule(EMBEDDINGS, ("embedding",), vocabulary=True),
        *norm(f"{layer}input_layernorm", f"{here}attention_norm"),
        *norm(f"{layer}post_attention_layernorm", f"{here}mlp_norm"),
        *norms,
        *(
            r
            for n in "qkvo"
            for r in linear(f"{layer}self_attn.{n}_proj", f"{here}attention/{n}", bias=n in biases)
        ),
        *(
            r
            for n in ("gate", "up", "down")
            for r in linear(f"{layer}mlp.{n}_proj", f"{here}mlp/{n}", bias=False)
        ),
        *norm("model.norm", "norm"),
    ]
    if not cfg.tie_word_embeddings:
        table.append(Rule(HEAD, ("lm_head/kernel",), "linear", vocabulary=True))
    return table


def connector(cfg: object) -> list[Rule]:
    """Return the rules of `torch.nn.Sequential(Linear, GELU, Linear, RMSNorm)`."""
    return [*linear("0", "linear1"), *linear("2", "linear2"), *norm("3", "norm")]


def sana(cfg: SanaConfig) -> list[Rule]:
    """Return the rules of `diffusers.SanaTransformer2DModel`."""
    table = [
        *linear("patch_embed.proj", "patch_embed", "conv"),
        *linear("time_embed.emb.timestep_embedder.linear_1", "time_embed/linear_1"),
        *linear("time_embed.emb.timestep_embedder.linear_2", "time_embed/linear_2"),
        *linear("time_embed.linear", "time_embed/modulation"),
        *linear("caption_projection.linear_1", "caption_projection/linear_1"),
        *linear("caption_projection.linear_2", "caption_projection/linear_2"),
        *norm("caption_norm", "caption_norm"),
        Rule("scale_shift_table", ("scale_shift_table",)),
        *linear("proj_out", "proj_out"),
        Rule("transformer_blocks.{i}.scale_shift_table", ("blocks/scale_shift_table",)),
    ]
    for torch, path, bias in (
        ("attn1", "self_attention", False),
        ("attn2", "cross_attention", True),
    ):
        torch, path = f"transformer_blocks.{{i}}.{torch}", f"blocks/{path}"
        table += [
            rule for n in "qkv" for rule in linear(f"{torch}.to_{n}", f"{path}/{n}", bias=bias)
        ]
        table += linear(f"{torch}.to_out.0", f"{path}/o")
        # Without qk_norm the stock class has no such tensors.
        if cfg.qk_norm:
            table += [rule for n in "qk" for rule in norm(f"{torch}.norm_{n}", f"{path}/{n}_norm")]
    torch, path = "transformer_blocks.{i}.ff", "blocks/ffn"
    # 1 x 1 convolutions are matrix products here.
    table += linear(f"{torch}.conv_inverted", f"{path}/expand", "conv1x1")
    table += linear(f"{torch}.conv_depth", f"{path}/depthwise", "conv")
    return table + linear(f"{torch}.conv_point", f"{path}/contract", "conv1x1", bias=False)


_RES_BLOCK = [
    *linear("conv1", "conv1", "conv"),
    *linear("conv2", "conv2", "conv", bias=False),
    *norm("norm", "norm", bias=True),
]


def _efficient_vit_block(scales: int) -> list[Rule]:
    table = [
        rule for n in "qkv" for rule in linear(f"attn.to_{n}", f"attention/to_{n}", bias=False)
    ]
    for s in range(scales):
        for name in ("proj_in", "proj_out"):
            table += linear(
                f"attn.to_qkv_multiscale.{s}.{name}",
                f"attention/scales/{s}/{name}",
                "conv",
                bias=False,
            )
    return [
        *table,
        *linear("attn.to_out", "attention/to_out", bias=False),
        *norm("attn.norm_out", "attention/norm", bias=True),
        *linear("conv_out.conv_inverted", "glu/expand", "conv1x1"),
        *linear("conv_out.conv_depth", "glu/depthwise", "conv"),
        *linear("conv_out.conv_point", "glu/project", "conv1x1", bias=False),
        *norm("conv_out.norm", "glu/norm", bias=True),
    ]


def dc_ae(vae: DcAeConfig) -> list[Rule]:
    """Return the rules of `diffusers.AutoencoderDC`.

    Its stages are lists of blocks; the resampling follows them in the encoder and precedes them in
    the decoder.
    """
    # If the outermost stage has no blocks, the convolution is a whole down or up block.
    inner = {
        side: "" if getattr(vae, f"{side}_layers_per_block")[0] else "conv"
        for side in ("encoder", "decoder")
    }
    join = lambda name, last, sign: f"{name}{sign}{last}" if last else name
    return [
        *linear(
            join("encoder.conv_in", inner["encoder"], "."),
            join("encoder/conv_in", inner["encoder"], "/"),
            "conv",
        ),
        *_stages(vae, "encoder", "down_blocks"),
        *linear("encoder.conv_out", "encoder/conv_out", "conv"),
        *linear("decoder.conv_in", "decoder/conv_in", "conv"),
        *_stages(vae, "decoder", "up_blocks"),
        *norm("decoder.norm_out", "decoder/norm_out", bias=True),
        *linear(
            join("decoder.conv_out", inner["decoder"], "."),
            join("decoder/conv_out", inner["decoder"], "/"),
            "conv",
        ),
    ]


def _stages(vae: DcAeConfig, side: str, torch: str) -> list[Rule]:
    kinds, layers = getattr(vae, f"{side}_block_types"), getattr(vae, f"{side}_layers_per_block")
    table = []
    for stage, (kind, count) in enumerate(zip(kinds, layers, strict=True)):
        if not count:
            continue
        resampled = stage < len(layers) - 1
        at, here = f"{side}.{torch}.{stage}.", f"{side}/stages/{stage}/"
        # In torch one list of modules holds the blocks and the resampling, which comes last in the
        # encoder and first in the decoder: hence its index, and the offset of the decoder's blocks.
        if resampled:
            table += linear(
                f"{at}{count if side == 'encoder' else 0}.conv", f"{here}resample/conv", "conv"
            )
        scales = len(getattr(vae, f"{side}_qkv_multiscales")[stage])
        block = _RES_BLOCK if kind == "ResBlock" else _efficient_vit_block(scales)
        table += prefixed(
            f"{at}{{i}}.",
            f"{here}blocks/",
            block,
            layer_offset=int(resampled and side == "decoder"),
        )
    return table
