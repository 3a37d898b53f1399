"""Compute the FLOPs of the joint training step from the architecture, part by part: {part:
(forward, backward)}.

A multiply-add is two. Each thing is counted once, of causal attention the half that is seen; only
the work of the matrix unit counts: depthwise convolutions are shifted products on TPUs, and sums
and norms are no products.

The AR, its head and the connector are trained: the backward pass makes the gradients of inputs and
weights, twice the forward's products. Of the DiT only the caption layers are: elsewhere it makes
the gradient of the input alone. Encoders have none.
"""

from blip3o_jax.config import Config, DcAeConfig
from blip3o_jax.data.sequence import max_labels


def joint_step(config: Config, tables: int = 1) -> dict[str, tuple[float, float]]:
    """Return the FLOPs; `tables`: on how many devices the tokenizer's codes are made of their
    embedding, each time the whole table."""
    model, rows, length = config.model, config.data.batch_size, config.data.max_length
    labels = max_labels(model.template, model.tokenizer.num_tokens) or length
    found = {
        "ar": _ar(model.ar, rows, length),
        "cross_entropy": _twice(
            2 * rows * min(labels, length - 1) * model.ar.hidden_size * model.ar.padded_vocab_size
        ),
        "connector": _connector(config),
        "dit": _dit(config),
    }
    if not config.data.cache_dir:
        found |= {
            "vae": (rows * _vae_encoder(model.vae, model.image_size), 0),
            "tokenizer": (_tokenizer(config, tables), 0),
        }
    return found


def _twice(forward):
    return forward, 2 * forward


def _ar(ar, rows, length):
    d, heads, kv_heads = (
        ar.hidden_size,
        ar.num_attention_heads * ar.head_dim,
        ar.num_key_value_heads * ar.head_dim,
    )
    weights = d * (heads + 2 * kv_heads) + heads * d + 3 * d * ar.intermediate_size
    dense = 2 * rows * length * weights * ar.num_hidden_layers
    # One product over the pairs of a query and the keys up to its own, all heads: q k and p v
    # forward. Backward q k again, which a flash attention does not keep, then dp, dv, dq, dk.
    product = 2 * rows * length * (length + 1) // 2 * heads * ar.num_hidden_layers
    return dense + 2 * product, 2 * dense + 5 * product


def _connector(config):
    d_in, d_out = config.model.ar.hidden_size, config.model.dit.caption_channels
    return _twice(
        2
        * config.data.batch_size
        * (config.model.tokenizer.num_tokens + 1)
        * (d_in * d_out + d_out * d_out)
    )


def _dit(config):
    dit, rows = config.model.dit, config.data.batch_size * config.loss.flow_samples
    d, f = dit.hidden_size, int(dit.mlp_ratio * dit.hidden_size)
    tokens, condition = (
        (config.model.latent_size // dit.patch_size) ** 2,
        config.model.tokenizer.num_tokens + 1,
    )
    patch = dit.patch_size**2
    layers = dit.num_layers * rows
    # q k v o; q o; feed-forward
    on_latents = 2 * layers * tokens * (4 * d * d + 2 * d * d + 2 * f * d + f * d)
    on_condition = 2 * layers * condition * 2 * d * d
    # the state, and what queries read of it
    linear_attention = 2 * 2 * layers * tokens * d * dit.attention_head_dim
    cross_attention = 2 * 2 * layers * tokens * condition * d
    time = 2 * rows * (256 * d + d * d + 6 * d * d)
    caption = 2 * rows * condition * (dit.caption_channels * d + d * d)
    embed, out = (
        2 * rows * tokens * dit.in_channels * patch * d,
        2 * rows * tokens * d * dit.out_channels * patch,
    )
    forward = (
        on_latents
        + on_condition
        + linear_attention
        + cross_attention
        + time
        + caption
        + embed
        + out
    )
    backward = on_latents + on_condition + 2 * (linear_attention + cross_attention + caption) + out
    return forward, backward


def _vae_encoder(vae: DcAeConfig, size: int):
    """Return the FLOPs of one image. At the border one of the three rows of a 3 x 3 kernel has
    no input."""
    channels = vae.encoder_block_out_channels
    total = _conv(vae.in_channels, channels[0], size)
    for i, (kind, c) in enumerate(zip(vae.encoder_block_types, channels, strict=True)):
        layers = vae.encoder_layers_per_block[i]
        if kind == "ResBlock":
            total += layers * 2 * _conv(c, c, size)
        else:
            total += (
                layers
                * 2
                * size**2
                * _vit_block(c, vae.attention_head_dim, len(vae.encoder_qkv_multiscales[i]))
            )
        if i < len(channels) - 1:
            total += 2 * (3 * size // 2 - 1) ** 2 * c * channels[i + 1]
            size //= 2
    return total + _conv(channels[-1], vae.latent_channels, size)


def _conv(c_in, c_out, size):
    return 2 * (3 * size - 2) ** 2 * c_in * c_out


def _vit_block(c, head, scales):
    """Return the products of one pixel: q k v, a grouped projection for each scale, the state and
    its readout, out; the GLU."""
    inner = c // head * head
    attention = (
        3 * c * inner
        + scales * 3 * inner * head
        + 2 * inner * (1 + scales) * head
        + inner * (1 + scales) * c
    )
    return attention + 8 * c * c + 4 * c * c


def _tokenizer(config, tables):
    cfg, rows = config.model.tokenizer, config.data.batch_size
    encoder, d, patches = cfg.encoder, cfg.encoder.hidden_size, cfg.encoder.grid**2
    layer = patches * (4 * d * d + 2 * d * encoder.intermediate_size) + 2 * patches**2 * d
    embed = patches * 3 * encoder.patch_size**2 * d
    # Layers past the one that is selected are passed over.
    features = 2 * rows * (embed + (encoder.num_hidden_layers + 1 + cfg.select_layer) * layer)
    codes = (
        2
        * rows
        * cfg.num_tokens
        * (d * d + d * cfg.bottleneck_dim + cfg.bottleneck_dim * cfg.codebook_size)
    )
    return features + codes + 2 * tables * cfg.codebook_size * cfg.bottleneck_dim**2
