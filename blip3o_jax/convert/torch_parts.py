"""Define PyTorch modules for the parts without a stock class: TA-Tok and the connector.

They compose stock classes and layers, and their state dicts have the published keys. Images are
[B, C, H, W].

Legend: B batch, N image tokens, T condition tokens, D width, C channels, K codes.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from blip3o_jax.config import ConnectorConfig, SiglipVisionConfig, TaTokConfig
from blip3o_jax.convert.stock_config import OWN_FIELDS


class Quantised(NamedTuple):
    """Hold the quantised vectors and training terms of `image_tokens.simvq.Quantised`."""

    codes_BND: torch.Tensor  # straight-through, float32
    ids_BN: torch.Tensor  # int64
    codebook_loss: torch.Tensor
    commitment_loss: torch.Tensor
    entropy_gap: torch.Tensor


class TaTok(torch.nn.Module):
    """Encode and decode images: stock SigLIP and Siglip2 around a bottleneck.

    `image_tokens.ta_tok` has the equations. The codebook computes in float32 for every dtype of the
    weights, since the differences of neighbouring codes are below bfloat16's resolution.
    """

    # torch.nn.Module's `__getattr__` would type submodules as `Tensor | Module`.
    encoder: Any
    encode_task_layer: Any
    bottleneck: Any
    decoder: Any
    decode_task_layer: Any

    def __init__(self, cfg: TaTokConfig):
        super().__init__()
        linear, tanh = torch.nn.Linear, torch.nn.Tanh()
        d, d_decoder, d_code = cfg.encoder.hidden_size, cfg.decoder.hidden_size, cfg.bottleneck_dim
        self.encoder = _vision_transformer(
            transformers.SiglipVisionModel(siglip_config(cfg.encoder))
        )
        self.encode_task_layer = torch.nn.Sequential(linear(d, d), tanh)
        self.bottleneck = torch.nn.Module()
        self.bottleneck.in_linear = linear(d, d_code)
        self.bottleneck.out_linear = linear(d_code, d_code)
        self.bottleneck.regularizer = torch.nn.Module()
        self.bottleneck.regularizer.embedding = torch.nn.Embedding(cfg.codebook_size, d_code)
        self.bottleneck.regularizer.embedding_proj = linear(d_code, d_code)
        self.decoder = torch.nn.Module()
        self.decoder.vision_model = _vision_transformer(
            transformers.Siglip2VisionModel(ta_tok_decoder_config(cfg))
        )
        self.decode_task_layer = torch.nn.Sequential(
            linear(d_decoder, d_decoder), tanh, linear(d_decoder, d)
        )
        self.cfg = cfg

    @property
    def dtype(self) -> torch.dtype:
        """Return the weights' dtype."""
        return self.encode_task_layer[0].weight.dtype

    def features(self, x_BCHW: torch.Tensor, scale: int | None = None) -> torch.Tensor:
        """Return pooled SigLIP2 features [B, N, D], float32, of images in [-1, 1].

        They have no gradient. Layers after the selected one are not run.
        """
        depth = self.cfg.encoder.num_hidden_layers + 1 + self.cfg.select_layer
        x_BND = self.encoder.embeddings(x_BCHW.to(self.dtype))
        for layer in self.encoder.encoder.layers[:depth]:
            x_BND = layer(x_BND, attention_mask=None)
        grid = self.cfg.encoder.grid
        # Pooled in float32, like `ta_tok.pool`.
        x_BDHW = x_BND.detach().float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        return F.avg_pool2d(x_BDHW, scale or self.cfg.pool_scale).flatten(2).transpose(1, 2)

    def encode(self, x_BCHW: torch.Tensor, scale: int | None = None) -> torch.Tensor:
        """Encode images in [-1, 1] to the best codebook indices [B, N], int64."""
        return self._scores(self._to_codes(self.features(x_BCHW, scale)), self.table()).argmax(-1)

    def quantise(self, features_BND: torch.Tensor) -> Quantised:
        """Quantise pooled features [B, N, D] for training."""
        z_BND = self._to_codes(features_BND)
        table_KD = self.table()
        scores_BNK = self._scores(z_BND, table_KD)
        ids_BN = scores_BNK.argmax(-1)
        codes_BND = table_KD[ids_BN]
        p_K = (scores_BNK / self.cfg.stochastic_temperature).softmax(-1).mean((0, 1))
        return Quantised(
            codes_BND=z_BND + (codes_BND - z_BND).detach(),
            ids_BN=ids_BN,
            codebook_loss=(z_BND.detach() - codes_BND).square().sum(-1).mean(),
            commitment_loss=(z_BND - codes_BND.detach()).square().sum(-1).mean(),
            entropy_gap=math.log(self.cfg.codebook_size) + (p_K * p_K.clamp_min(1e-20).log()).sum(),
        )

    def reconstruct(self, codes_BND: torch.Tensor) -> torch.Tensor:
        """Decode codes of a square token grid to SigLIP2 features [B, N, D], float32."""
        batch, tokens = codes_BND.shape[:2]
        side = math.isqrt(tokens)
        x_BND = self.decoder.vision_model(
            self.bottleneck.out_linear(codes_BND.to(self.dtype)),
            torch.ones(batch, tokens, dtype=torch.int64, device=codes_BND.device),
            torch.tensor([[side, side]] * batch, device=codes_BND.device),
        ).last_hidden_state
        return self.decode_task_layer(x_BND).float()

    def decode(self, ids_BN: torch.Tensor) -> torch.Tensor:
        """Decode indices [B, N] to SigLIP2 features [B, N, D], float32."""
        return self.reconstruct(self.table()[ids_BN])

    def table(self) -> torch.Tensor:
        """Return the codes [K, D], float32."""
        codebook = self.bottleneck.regularizer
        projection = codebook.embedding_proj
        return self._normalise(
            F.linear(
                codebook.embedding.weight.float(),
                projection.weight.float(),
                projection.bias.float(),
            )
        )

    def _to_codes(self, features_BND: torch.Tensor) -> torch.Tensor:
        z_BND = self.bottleneck.in_linear(self.encode_task_layer(features_BND.to(self.dtype)))
        return self._normalise(z_BND.float())

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1) if self.cfg.l2_normalized else x

    def _scores(self, z_BND: torch.Tensor, table_KD: torch.Tensor) -> torch.Tensor:
        """Return the cosine, or the negative squared distance without the constant |z|^2."""
        dot_BNK = z_BND @ table_KD.T
        return dot_BNK if self.cfg.l2_normalized else 2 * dot_BNK - table_KD.square().sum(-1)


class Connector(torch.nn.Sequential):
    """Apply Linear, GELU (tanh form), Linear, RMSNorm: keys 0, 2 and 3."""

    def __init__(self, cfg: ConnectorConfig, d_in: int, d_out: int):
        norm = torch.nn.RMSNorm(d_out, eps=cfg.rms_norm_eps)
        torch.nn.init.constant_(norm.weight, cfg.norm_init)
        super().__init__(
            torch.nn.Linear(d_in, d_out),
            torch.nn.GELU(approximate="tanh"),
            torch.nn.Linear(d_out, d_out),
            norm,
        )
        self.positions = cfg.positions

    def forward(self, hidden_BTD: torch.Tensor, keep_B: torch.Tensor | None = None) -> torch.Tensor:
        """Map [B, T, d_in] to [B, T, d_out]; rows with `keep_B` False have zeros for input."""
        if self.positions:
            hidden_BTD = hidden_BTD + sinusoids(*hidden_BTD.shape[1:]).to(hidden_BTD)
        if keep_B is not None:
            hidden_BTD = hidden_BTD.masked_fill(~keep_B[:, None, None], 0)
        return super().forward(hidden_BTD)


def sinusoids(length: int, dim: int) -> torch.Tensor:
    """Return sinusoidal position embeddings [length, dim], float32: sines, then cosines.

    An odd last column is 0.
    """
    half = dim // 2
    angles = np.outer(np.arange(length), 10000.0 ** (-np.arange(half) / half))
    table = np.concatenate([np.sin(angles), np.cos(angles), np.zeros((length, dim % 2))], axis=1)
    return torch.tensor(table, dtype=torch.float32, device="cpu")


def siglip_config(cfg: SiglipVisionConfig) -> transformers.SiglipVisionConfig:
    """Return the stock configuration of the vision encoder."""
    return transformers.SiglipVisionConfig(**_stock_fields(cfg))


def ta_tok_decoder_config(cfg: TaTokConfig) -> transformers.Siglip2VisionConfig:
    """Return the stock configuration of TA-Tok's decoder."""
    return transformers.Siglip2VisionConfig(
        patch_size=1, num_channels=cfg.bottleneck_dim, **_stock_fields(cfg.decoder)
    )


def _stock_fields(cfg: Any) -> dict[str, Any]:
    return {
        f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name not in OWN_FIELDS
    }


def _vision_transformer(model: torch.nn.Module) -> torch.nn.Module:
    """Return the vision transformer; early releases of transformers 5 have it as an attribute."""
    return getattr(model, "vision_model", model)
