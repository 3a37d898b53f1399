"""Weights of `transformers.Qwen3ForCausalLM` as this package's tree: one declarative table, every key consumed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from blip3o_jax import config
from blip3o_jax.ar.qwen3 import Qwen3

# torch key ("{i}" a layer) -> (path, transpose?, axis that holds the vocabulary, if any)
TABLE = {
    "model.embed_tokens.weight": ("embedding", False, 0),
    "model.layers.{i}.input_layernorm.weight": ("layers/attention_norm/scale", False, None),
    "model.layers.{i}.post_attention_layernorm.weight": ("layers/mlp_norm/scale", False, None),
    "model.layers.{i}.self_attn.q_proj.weight": ("layers/attention/q/kernel", True, None),
    "model.layers.{i}.self_attn.k_proj.weight": ("layers/attention/k/kernel", True, None),
    "model.layers.{i}.self_attn.v_proj.weight": ("layers/attention/v/kernel", True, None),
    "model.layers.{i}.self_attn.o_proj.weight": ("layers/attention/o/kernel", True, None),
    "model.layers.{i}.self_attn.q_norm.weight": ("layers/attention/q_norm/scale", False, None),
    "model.layers.{i}.self_attn.k_norm.weight": ("layers/attention/k_norm/scale", False, None),
    "model.layers.{i}.mlp.gate_proj.weight": ("layers/mlp/gate/kernel", True, None),
    "model.layers.{i}.mlp.up_proj.weight": ("layers/mlp/up/kernel", True, None),
    "model.layers.{i}.mlp.down_proj.weight": ("layers/mlp/down/kernel", True, None),
    "model.norm.weight": ("norm/scale", False, None),
    "lm_head.weight": ("lm_head/kernel", True, 1),
}


def torch_config(cfg: config.Qwen3Config) -> transformers.Qwen3Config:
    names = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps tie_word_embeddings initializer_range"""
    return transformers.Qwen3Config(
        **{name: getattr(cfg, name) for name in names.split()},
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        attn_implementation="eager",
    )


def torch_model(cfg: config.Qwen3Config, seed: int = 0) -> transformers.Qwen3ForCausalLM:
    """float32, every parameter random: norms around 1, so that a forgotten or swapped one shows."""
    torch.manual_seed(seed)
    model = transformers.Qwen3ForCausalLM(torch_config(cfg)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else 0.15 * torch.randn_like(p))
    return model


def convert(named: dict[str, torch.Tensor], cfg: config.Qwen3Config) -> dict[str, np.ndarray]:
    """torch name -> tensor, as path -> array: layers stacked, vocabulary rows padded with zeros."""
    if cfg.tie_word_embeddings:
        named = {k: v for k, v in named.items() if k != "lm_head.weight"}
    grouped: dict[str, dict[int, np.ndarray]] = {}
    for key, tensor in named.items():
        path, transpose, vocab_axis = TABLE[re.sub(r"\.\d+\.", ".{i}.", key)]
        array = tensor.detach().numpy()
        array = array.T if transpose else array
        if vocab_axis is not None:
            padding = [(0, 0)] * array.ndim
            padding[vocab_axis] = (0, cfg.padded_vocab_size - cfg.vocab_size)
            array = np.pad(array, padding)
        index = re.search(r"\.(\d+)\.", key)
        layers = grouped.setdefault(path, {})
        assert (index is None) == (not path.startswith("layers/"))
        layers[int(index[1]) if index else 0] = array
    return {
        path: np.stack([layers[i] for i in range(len(layers))]) if path.startswith("layers/") else layers[0]
        for path, layers in grouped.items()
    }


def flat(tree) -> dict[str, jax.Array]:
    """An NNX state (of parameters or gradients) as path -> array."""
    return {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.as_pure(tree))}


def jax_model(torch_model: transformers.Qwen3ForCausalLM, cfg: config.Qwen3Config) -> Qwen3:
    model = nnx.eval_shape(lambda: Qwen3(cfg, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    arrays = convert(torch_model.state_dict(), cfg)
    shapes = {path: tuple(value.shape) for path, value in flat(state).items()}
    assert {path: array.shape for path, array in arrays.items()} == shapes
    pure = {tuple(path.split("/")): jnp.asarray(array) for path, array in arrays.items()}
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(pure))
    nnx.update(model, state)
    return model
