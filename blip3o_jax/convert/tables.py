"""Map PyTorch tensors to parameters here: one table for each family of a part, read in both
directions. conversions.py says which family has which.

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

    `torch` is the pattern, `paths` are the parameters', and `first` is the value of `{i}` for layer
    0. `vocabulary` marks a tensor whose first dimension is the vocabulary, which this package pads.
    """

    torch: str
    paths: tuple[str, ...]
    layout: str = "same"
    first: int = 0
    vocabulary: bool = False

    @property
    def stacked(self) -> bool:
        return "{i}" in self.torch

    @property
    def by_rows(self) -> bool:
        """Return whether the tensor can be converted a few rows at a time.

        Its rows are then rows, or columns (`transposed`), of one parameter.
        """
        return self.layout in ("same", "linear") and len(self.paths) == 1 and not self.stacked

    @property
    def transposed(self) -> bool:
        return self.layout == "linear"

    def key(self, layer: int) -> str:
        """Return the tensor's name for a layer here."""
        return self.torch.replace("{i}", str(layer + self.first))


# Parts in the order of the image's way, and what comes before their names in a BLIP3o-NEXT
# directory.
# The parts of the published BLIP3o-NEXT; a model for editing has more.
PUBLISHED_PARTS = ("tokenizer", "ar", "connector", "dit", "vae")
PREFIXES = {
    "tokenizer": "model.vision_tower.vision_tower.",
    "ar": "",
    "connector": "model.diffusion_connector.",
    "latent_connector": "model.und_image_vae_connector.",
    "feature_connector": "model.tar_siglip_features_connector.",
    "dit": "model.sana.",
    "vae": "model.sana_vae.",
}


def linear(
    torch: str, path: str, layout: str = "linear", *, bias: bool = True, first: int = 0
) -> list[Rule]:
    """Return the rules of a linear layer: weight, and bias where there is one."""
    weight = Rule(f"{torch}.weight", (f"{path}/kernel",), layout, first)
    return [weight, Rule(f"{torch}.bias", (f"{path}/bias",), first=first)] if bias else [weight]


def norm(torch: str, path: str, *, bias: bool = False, first: int = 0) -> list[Rule]:
    scale = Rule(f"{torch}.weight", (f"{path}/scale",), first=first)
    return [scale, Rule(f"{torch}.bias", (f"{path}/bias",), first=first)] if bias else [scale]


def prefixed(torch: str, path: str, table: list[Rule], *, first: int = 0) -> list[Rule]:
    return [
        dataclasses.replace(
            rule, torch=torch + rule.torch, paths=tuple(path + p for p in rule.paths), first=first
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
        Rule("model.embed_tokens.weight", ("embedding",), vocabulary=True),
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
        table.append(Rule("lm_head.weight", ("lm_head/kernel",), "linear", vocabulary=True))
    return table


# Of the stock class's `MultiheadAttention`, which stores query, key and value as one.
_POOL = ("attention/query", "attention/key", "attention/value")


def _vision_model(patch_layout: str) -> list[Rule]:
    """Return the rules of `transformers.SiglipVisionModel` ("patch") or `Siglip2VisionModel`
    ("linear").
    """
    layer, here = "encoder.layers.{i}.", "encoder/layers/"
    attention = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"))
    return [
        *linear("embeddings.patch_embedding", "patch_embedding", patch_layout),
        Rule("embeddings.position_embedding.weight", ("position_embedding",)),
        *norm(f"{layer}layer_norm1", f"{here}norm1", bias=True),
        *(
            r
            for torch, path in attention
            for r in linear(f"{layer}self_attn.{torch}", f"{here}attention/{path}")
        ),
        *norm(f"{layer}layer_norm2", f"{here}norm2", bias=True),
        *linear(f"{layer}mlp.fc1", f"{here}mlp/up"),
        *linear(f"{layer}mlp.fc2", f"{here}mlp/down"),
        *norm("post_layernorm", "post_layernorm", bias=True),
        Rule("head.probe", ("head/probe",), "probe"),
        Rule("head.attention.in_proj_weight", tuple(f"head/{p}/kernel" for p in _POOL), "linear"),
        Rule("head.attention.in_proj_bias", tuple(f"head/{p}/bias" for p in _POOL)),
        *linear("head.attention.out_proj", "head/attention/out"),
        *norm("head.layernorm", "head/norm", bias=True),
        *linear("head.mlp.fc1", "head/mlp/up"),
        *linear("head.mlp.fc2", "head/mlp/down"),
    ]


def ta_tok(cfg: object) -> list[Rule]:
    """Return the rules of TA-Tok; its SigLIP classes lie one level deeper in the decoder than in
    the encoder.
    """
    return [
        *prefixed("encoder.", "encoder/", _vision_model("patch")),
        *linear("encode_task_layer.0", "encode_task_layer"),
        *linear("bottleneck.in_linear", "bottleneck/in_linear"),
        Rule("bottleneck.regularizer.embedding.weight", ("bottleneck/codebook/embedding",)),
        *linear("bottleneck.regularizer.embedding_proj", "bottleneck/codebook/embedding_proj"),
        *linear("bottleneck.out_linear", "bottleneck/out_linear"),
        *prefixed("decoder.vision_model.", "decoder/", _vision_model("linear")),
        *linear("decode_task_layer.0", "decode_task_layer1"),
        *linear("decode_task_layer.2", "decode_task_layer2"),
    ]


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
        if cfg.qk_norm:
            table += [rule for n in "qk" for rule in norm(f"{torch}.norm_{n}", f"{path}/{n}_norm")]
    torch, path = "transformer_blocks.{i}.ff", "blocks/ffn"
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
    """Return the rules of `diffusers.AutoencoderDC`. Its stages are lists of blocks with the change
    of resolution after them in the encoder and before them in the decoder.
    """
    # An outermost stage without blocks makes the convolution a whole down or up block.
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
        if resampled:
            table += linear(
                f"{at}{count if side == 'encoder' else 0}.conv", f"{here}resample/conv", "conv"
            )
        scales = len(getattr(vae, f"{side}_qkv_multiscales")[stage])
        block = _RES_BLOCK if kind == "ResBlock" else _efficient_vit_block(scales)
        table += prefixed(
            f"{at}{{i}}.", f"{here}blocks/", block, first=int(resampled and side == "decoder")
        )
    return table
