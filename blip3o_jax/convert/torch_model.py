"""Build the model from the stock PyTorch classes, for comparison.

`convert verify`, `bench peer` and the parity tests use it. Needs the extra [convert].
torch_parts.py defines the parts that have no stock class. Keys of the parts' state dicts are the
published ones without the part's prefix. Images and latents are [B, C, H, W].

Legend: B batch, L row length, N image tokens, T condition tokens (N + 1), D width, C channels, V
vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers

from blip3o_jax.config import FlowConfig, ModelConfig, SamplingConfig
from blip3o_jax.convert.conversions import conversion_of, stock_config
from blip3o_jax.convert.tables import CONVERTED_PARTS
from blip3o_jax.part_registry import PART_TABLE, resolve, settings_of


def part(
    name: str,
    cfg: ModelConfig,
    *,
    device: torch.device | str | None = None,
    attn_implementation: str = "sdpa",
) -> torch.nn.Module:
    """Return one part with the sizes of `cfg`, initialised, in float32 and eval mode.

    `name` is one of `PUBLISHED_PARTS`, or editing's "latent_connector" or "feature_connector".
    `device` is the CPU by default. The AR has `cfg.ar.vocab_size` rows, without padding;
    `attn_implementation` ("sdpa" or "eager") applies to the AR only. Raises ValueError for an
    unknown name.
    """
    if name not in CONVERTED_PARTS:
        raise ValueError(f"there is no part {name!r}: use one of {', '.join(CONVERTED_PARTS)}")
    conversion = conversion_of(name, cfg)
    cls = resolve(conversion.torch_class)
    with torch.device(device or "cpu"):
        if conversion.library == "transformers":
            fields = cls.config_class.from_dict(
                stock_config(name, cfg), attn_implementation=attn_implementation
            )
            return cls(fields).eval()
        if conversion.library == "diffusers":
            return cls.from_config(stock_config(name, cfg)).eval()
        arguments = PART_TABLE[name].arguments
        positional, _ = arguments(cfg) if arguments else ((settings_of(name, cfg),), {})
        return cls(*positional).eval()


def scheduler(cfg: FlowConfig) -> Any:
    """Return the stock `FlowMatchEulerDiscreteScheduler`, which diffusers does not type."""
    return diffusers.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=cfg.num_train_timesteps, shift=cfg.shift
    )


class Blip3o(torch.nn.Module):
    """Run the parts together, as `blip3o.Blip3o` does.

    `parts` is {name of `PUBLISHED_PARTS`: module}; methods require the parts that they use.
    """

    # torch.nn.Module's `__getattr__` would type submodules as `Tensor | Module`.
    tokenizer: Any
    ar: Any
    connector: Any
    dit: Any
    vae: Any

    def __init__(self, cfg: ModelConfig, parts: Mapping[str, torch.nn.Module]):
        super().__init__()
        for name, module in parts.items():
            self.add_module(name, module)
        self.cfg = cfg

    def codes(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Encode images in [-1, 1] at the tokenizer's size to codebook indices [B, N]."""
        with torch.no_grad():
            return self.tokenizer.encode(x_BCHW)

    def latents(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Encode images in [-1, 1] at the target size to scaled latents, float32."""
        with torch.no_grad():
            z_BCHW = self.encode_image(x_BCHW.to(self.vae.dtype))
        return z_BCHW.float() * self.cfg.vae.scaling_factor

    def pixels(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents to images in [0, 1], float32."""
        with torch.no_grad():
            x_BCHW = self.decode_latents((z_BCHW / self.cfg.vae.scaling_factor).to(self.vae.dtype))
        return (x_BCHW.float() / 2 + 0.5).clamp(0, 1)

    def encode_image(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the autoencoder's raw latents [B, C, h, w] of images in [-1, 1]."""
        encode = conversion_of("vae", self.cfg).encode
        assert encode is not None, "every family of the autoencoder has one"
        return encode(self.vae, x_BCHW)

    def decode_latents(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the autoencoder's images [B, 3, H, W] of raw latents, not clipped."""
        decode = conversion_of("vae", self.cfg).decode
        assert decode is not None, "every family of the autoencoder has one"
        return decode(self.vae, z_BCHW)

    def hidden(
        self,
        tokens_BL: torch.Tensor,
        positions_BL: torch.Tensor | None = None,
        segment_ids_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return hidden states [B, L, D] after the final norm.

        Tokens attend to earlier ones of their segment; segment 0 is padding. Rows of one example
        padded on the right need no positions and segments: causal attention excludes the padding.
        """
        mask = None if segment_ids_BL is None else attention_mask(segment_ids_BL, self.ar.dtype)
        out = self.ar.model(
            input_ids=tokens_BL, attention_mask=mask, position_ids=positions_BL, use_cache=False
        )
        return out.last_hidden_state

    def condition(
        self, hidden_BTD: torch.Tensor, keep_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map hidden states to condition tokens; `keep_B` False gives the null condition."""
        return self.connector(hidden_BTD.to(self.connector[0].weight.dtype), keep_B)

    def velocity(
        self, z_BCHW: torch.Tensor, timestep_B: torch.Tensor, condition_BTC: torch.Tensor
    ) -> torch.Tensor:
        """Return the velocity [B, C, H, W], float32; `timestep_B` is 1000 sigma, not rounded."""
        dtype = self.dit.dtype
        velocity = conversion_of("dit", self.cfg).velocity
        assert velocity is not None, "every family of the DiT has one"
        return velocity(
            self.dit, z_BCHW.to(dtype), condition_BTC.to(dtype), timestep_B.float()
        ).float()

    def joint_loss(
        self,
        tokens_BL: torch.Tensor,
        loss_mask_BL: torch.Tensor,
        span_B: torch.Tensor,
        codes_BN: torch.Tensor,
        latents_BCHW: torch.Tensor,
        noise_BCHW: torch.Tensor,
        sigma_B: torch.Tensor,
        *,
        image_token_offset: int,
        keep_B: torch.Tensor | None = None,
        positions_BL: torch.Tensor | None = None,
        segment_ids_BL: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cross entropy, flow loss) of `train.joint_loss` with condition_span "exact".

        The batch is that of data/sequence.py: `span_B` is the index of each row's scale token,
        `image_token_offset` the id of the first codebook entry; `codes` and `latents` compute the
        targets from images. Noise and sigma have B rows, or a multiple for several samples per
        example, which are consecutive.
        """
        index_BT = span_B.long()[:, None] + torch.arange(
            codes_BN.shape[1] + 1, device=span_B.device
        )
        tokens_BL = tokens_BL.long().scatter(
            1, index_BT[:, 1:], codes_BN.long() + image_token_offset
        )
        hidden_BLD = self.hidden(tokens_BL, positions_BL, segment_ids_BL)
        # Only labelled tokens enter the mean; the logits of all tokens do not fit in memory with
        # the published vocabulary.
        labelled = loss_mask_BL[:, 1:].bool()
        logits_XV = self.ar.lm_head(hidden_BLD[:, :-1][labelled]).float()
        cross_entropy = F.cross_entropy(logits_XV, tokens_BL[:, 1:][labelled])

        span_BTD = hidden_BLD.gather(1, index_BT[..., None].expand(-1, -1, hidden_BLD.shape[-1]))
        repeats = len(noise_BCHW) // len(latents_BCHW)
        condition_BTC = self.condition(span_BTD, keep_B).repeat_interleave(repeats, dim=0)
        z_BCHW = latents_BCHW.float().repeat_interleave(repeats, dim=0)
        noise_BCHW = noise_BCHW.float()
        sigma = sigma_B.float()[:, None, None, None]
        x_BCHW = (1 - sigma) * z_BCHW + sigma * noise_BCHW
        velocity_BCHW = self.velocity(
            x_BCHW, sigma_B.float() * self.cfg.flow.num_train_timesteps, condition_BTC
        )
        return cross_entropy, F.mse_loss(velocity_BCHW, noise_BCHW - z_BCHW)

    @torch.no_grad()
    def generate_image_tokens(
        self,
        tokens_BL: torch.Tensor,
        lengths_B: torch.Tensor,
        *,
        image_token_offset: int,
        settings: SamplingConfig,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample image tokens from prompts padded on the right.

        Returns (ids of the image tokens [B, N], hidden states of the scale token and the image
        tokens [B, N + 1, D]). As in the reference, `generate` runs on prompts padded on the left
        and a second pass computes the hidden states; here sampling is restricted to image ids and
        the second pass has an attention mask. Samples from torch's global generator.
        """
        count = self.cfg.tokenizer.num_tokens
        image_ids = (image_token_offset, image_token_offset + self.cfg.tokenizer.codebook_size)
        prompts_BL, mask_BL = left_padded(tokens_BL.long(), lengths_B)
        greedy = settings.temperature == 0
        sampling = {
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
        }
        out_BL = self.ar.generate(
            prompts_BL,
            attention_mask=mask_BL,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=count,
                do_sample=not greedy,
                guidance_scale=settings.token_guidance,
                pad_token_id=0,
                **({} if greedy else sampling),
            ),
            logits_processor=transformers.LogitsProcessorList(
                [ImageTokenLogitsProcessor(*image_ids)]
            ),
        )
        mask_BL = F.pad(mask_BL, (0, count), value=1)
        hidden_BLD = self.hidden(out_BL, (mask_BL.cumsum(1) - 1).clamp_min(0), mask_BL)
        return out_BL[:, -count:], hidden_BLD[:, -count - 1 :]

    @torch.no_grad()
    def sample_latents(
        self,
        condition_BTC: torch.Tensor,
        null_BTC: torch.Tensor,
        noise_BCHW: torch.Tensor,
        *,
        steps: int,
        guidance: float,
    ) -> torch.Tensor:
        """Sample scaled latents [B, C, H, W], float32, by Euler steps of the stock scheduler.

        Classifier-free guidance runs on the batch [null, condition]; a scale of 1 omits the null
        half.
        """
        euler = scheduler(self.cfg.flow)
        euler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=noise_BCHW.device)
        with_cfg = guidance != 1.0
        context_BTC = torch.cat([null_BTC, condition_BTC]) if with_cfg else condition_BTC
        z_BCHW = noise_BCHW.float()
        for timestep in euler.timesteps:
            x_BCHW = torch.cat([z_BCHW, z_BCHW]) if with_cfg else z_BCHW
            v_BCHW = self.velocity(x_BCHW, timestep.expand(len(x_BCHW)), context_BTC)
            if with_cfg:
                v_null_BCHW, v_BCHW = v_BCHW.chunk(2)
                v_BCHW = v_null_BCHW + guidance * (v_BCHW - v_null_BCHW)
            # The stock scheduler looks its step up by the timestep's value, which must therefore be
            # passed as it is.
            z_BCHW = euler.step(v_BCHW, timestep, z_BCHW).prev_sample
        return z_BCHW

    @torch.no_grad()
    def text_to_image(
        self,
        tokens_BL: torch.Tensor,
        lengths_B: torch.Tensor,
        *,
        image_token_offset: int,
        settings: SamplingConfig | None = None,
        seed: int = 0,
    ) -> torch.Tensor:
        """Sample images [B, 3, H, W] in [0, 1], float32, from prompts padded on the right.

        Prompts end with the scale token. Seeds torch's global generator.
        """
        settings = settings or SamplingConfig()
        torch.manual_seed(seed)
        _, hidden_BTD = self.generate_image_tokens(
            tokens_BL, lengths_B, image_token_offset=image_token_offset, settings=settings
        )
        condition_BTC = self.condition(hidden_BTD)
        null_BTC = self.condition(
            torch.zeros_like(hidden_BTD), torch.zeros_like(lengths_B, dtype=torch.bool)
        )
        size, channels = self.cfg.latent_size, self.cfg.vae.latent_channels
        noise_BCHW = torch.randn(len(tokens_BL), channels, size, size, device=tokens_BL.device)
        return self.pixels(
            self.sample_latents(
                condition_BTC,
                null_BTC,
                noise_BCHW,
                steps=settings.steps,
                guidance=settings.guidance,
            )
        )


class ImageTokenLogitsProcessor(transformers.LogitsProcessor):
    """Mask all ids outside first .. last - 1."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out_BV = torch.full_like(scores, -math.inf)
        out_BV[:, self.first : self.last] = scores[:, self.first : self.last]
        return out_BV


def left_padded(
    tokens_BL: torch.Tensor, lengths_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the padding of rows from right to left; return the rows and their mask (1: token).

    The rows are as long as the longest prompt.
    """
    longest = int(lengths_B.max())
    # Negative indices are padding.
    index_BL = (
        torch.arange(longest, device=tokens_BL.device) - (longest - lengths_B.long())[:, None]
    )
    mask_BL = (index_BL >= 0).long()
    return tokens_BL.gather(1, index_BL.clamp_min(0)) * mask_BL, mask_BL


def attention_mask(segment_ids_BL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the attention mask of a stock Qwen.

    It is the padding mask [B, L] for one segment per row, additive [B, 1, L, L] for several.
    """
    # The stock class adds the causal mask to a padding mask.
    if segment_ids_BL.max() <= 1:
        return segment_ids_BL
    length = segment_ids_BL.shape[1]
    same_BLL = segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=segment_ids_BL.device).tril()
    seen_BLL = same_BLL & causal_LL & (segment_ids_BL != 0)[:, None, :]
    return torch.zeros(seen_BLL.shape, dtype=dtype, device=seen_BLL.device).masked_fill(
        ~seen_BLL, torch.finfo(dtype).min
    )[:, None]
