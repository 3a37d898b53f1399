"""Compare Qwen2 with `transformers.Qwen2ForCausalLM`, cached, and over several devices."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from blip3o_jax import blip3o, config, nn
from blip3o_jax.ar.qwen2 import Qwen2
from blip3o_jax.convert import conversions
from tests import stock_weights, tiny
from tests.conftest import relative_error

# 203 rows pad to 208.
CFG = config.Qwen2Config(
    vocab_size=203,
    hidden_size=64,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_multiple=16,
    dtype="float32",
    remat="none",
)
B, L = 4, 12
POSITIONS = np.broadcast_to(np.arange(L), (B, L))
ONES = np.ones((B, L), np.int32)


def torch_model(cfg: config.Qwen2Config) -> transformers.Qwen2ForCausalLM:
    """Return the stock model in float32 with every parameter random, biases too, so that a
    forgotten or swapped one shows."""
    torch.manual_seed(0)
    values = conversions.stock_config("ar", config.ModelConfig(ar=cfg))
    made = transformers.Qwen2Config.from_dict(values, attn_implementation="eager")
    model = transformers.Qwen2ForCausalLM(made).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else 0.15 * torch.randn_like(p))
    return model


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CFG.vocab_size, (B, L))


@nnx.jit
def forward(model: Qwen2, ids_BL: jax.Array):
    hidden_BLD = model(model.embed(ids_BL), POSITIONS, ONES)
    return hidden_BLD, model.logits(hidden_BLD)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_and_cached_decoding(tied):
    cfg = dataclasses.replace(CFG, tie_word_embeddings=tied)
    reference, ids_BL = torch_model(cfg), tokens()
    with torch.no_grad():
        want = reference(torch.tensor(ids_BL), output_hidden_states=True)
    model = stock_weights.jax_model(reference, cfg)
    hidden, logits = forward(model, ids_BL)
    assert relative_error(hidden, want.hidden_states[-1]) < 1e-5
    assert relative_error(logits[..., : cfg.vocab_size], want.logits) < 1e-5
    assert np.all(np.asarray(logits[..., cfg.vocab_size :]) == -np.inf)

    @nnx.jit
    def extend(model, ids_BL, past):
        return model.extend(model.embed(ids_BL), np.ones(ids_BL.shape, np.int32), past)

    past, _ = model.start_decoding(B, L)
    found, past = extend(model, ids_BL[:, :7], past)
    found = [found]
    for t in range(7, L):
        step, past = extend(model, ids_BL[:, t : t + 1], past)
        found.append(step)
    assert relative_error(np.concatenate(found, axis=1), hidden) < 1e-5


@pytest.mark.parametrize("mesh", [("fsdp_tp", 1, 2, 2), ("fsdp_sp", 1, 2)], ids=lambda m: m[0])
def test_sharded_equals_unsharded(mesh):
    strategy = tiny.strategy(*mesh, sequence=2 if mesh[0] == "fsdp_sp" else 1)
    model = blip3o.Blip3o(config.ModelConfig(ar=CFG), ("ar",), seed=0)
    graphdef, state = nnx.split(model)
    # Biases start at zero: other values, so that a wrong one shows.
    params = jax.tree.map(
        lambda x: x + 0.01 * np.arange(x.size, dtype=np.float32).reshape(x.shape) / x.size,
        nnx.to_pure_dict(state),
    )
    placed = jax.device_put(params, strategy.parameter_shardings(state))

    def run(params, resolver):
        with nn.sharding_resolver(resolver):
            return nnx.merge(graphdef, params).hidden(tokens(), POSITIONS, ONES)

    want = jax.jit(lambda params: run(params, None))(params)
    got = jax.jit(lambda params: run(params, strategy.resolver))(placed)
    assert relative_error(got, want) < 1e-5
    bias = placed["ar"]["layers"]["attention"]["q"]["bias"]
    assert bias.sharding.is_fully_replicated == (mesh[0] == "fsdp_sp")
