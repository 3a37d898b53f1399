"""`transformers.Qwen3ForCausalLM` with the sizes of a configuration and random weights."""

import torch
import transformers

from blip3o_jax import config


def torch_config(cfg: config.Qwen3Config) -> transformers.Qwen3Config:
    names = """vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim
    rms_norm_eps tie_word_embeddings initializer_range"""
    return transformers.Qwen3Config(
        **{name: getattr(cfg, name) for name in names.split()},
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        attn_implementation="eager",
    )


def torch_model(cfg: config.Qwen3Config, seed: int = 0) -> transformers.Qwen3ForCausalLM:
    """Return the stock model in float32 with every parameter random: norms around 1, so that a
    forgotten or swapped one shows."""
    torch.manual_seed(seed)
    model = transformers.Qwen3ForCausalLM(torch_config(cfg)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else 0.15 * torch.randn_like(p))
    return model
