"""Check low-rank factors of the AR and the DiT: their outputs, their sharding, and the model after
they are removed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from blip3o_jax import config, lora, nn, parameter_counts
from blip3o_jax.blip3o import Blip3o, path_name
from blip3o_jax.dit.protocol import Condition
from tests import tiny
from tests.conftest import relative_error

TRAINED_PARTS = ("ar", "dit")
BASE = dataclasses.replace(tiny.model(), ar=dataclasses.replace(tiny.model().ar, vocab_size=64))


def with_lora(cfg, ar, dit):
    parts = {
        name: dataclasses.replace(getattr(cfg, name), lora=own)
        for name, own in (("ar", ar), ("dit", dit))
    }
    return dataclasses.replace(cfg, **parts)


# Other scales, other ranks; of the AR not all layers.
CFG = with_lora(
    BASE,
    config.LoraConfig(rank=3, alpha=6.0, targets=("q", "v", "o", "down")),
    config.LoraConfig(rank=2, alpha=1.0, targets=config.SANA_LINEAR),
)


def graph(cfg):
    return nnx.split(nnx.eval_shape(lambda: Blip3o(cfg, TRAINED_PARTS, seed=0)))[0]


@pytest.fixture(scope="module")
def drawn():
    """Return initial parameters of the model without factors and with them."""
    make = lambda cfg: lambda: nnx.to_pure_dict(nnx.state(Blip3o(cfg, TRAINED_PARTS, seed=0)))
    return jax.jit(make(BASE))(), jax.jit(make(CFG))()


def trained(params):
    """Randomize every B too, and the DiT's last layer, at a size that shows the layers before
    it."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        if path[-1].key == "lora_b":
            return jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
        return x * 100 if path[1].key == "proj_out" else x

    return jax.tree_util.tree_map_with_path(draw, params)


@functools.cache
def outputs(cfg, strategy=None):
    """Return the compiled function of parameters: ((loss, (hidden states, logits, velocity)), the
    loss's gradient)."""
    rng, graphdef = np.random.default_rng(1), graph(cfg)
    tokens_BL = rng.integers(0, 64, (8, 6), np.int32)
    positions_BL, segments_BL = np.broadcast_to(np.arange(6), (8, 6)), np.ones((8, 6), np.int32)
    z_BHWC = rng.normal(size=(8, 4, 4, 4)).astype(np.float32)
    condition_BTC, timestep_B = (
        rng.normal(size=(8, 3, 16)).astype(np.float32),
        np.linspace(1, 900, 8, dtype=np.float32),
    )

    def run(params):
        model = nnx.merge(graphdef, params)
        with nn.sharding_resolver(strategy.resolver if strategy else None):
            hidden_BLD = model.hidden(tokens_BL, positions_BL, segments_BL)
            with nn.part("ar"):
                logits_BLV = model.ar.logits(hidden_BLD)
            return (
                hidden_BLD,
                logits_BLV,
                model.velocity(z_BHWC, timestep_B, Condition(condition_BTC)),
            )

    def loss(params):
        found = run(params)
        # Not the squares: those of normed states hardly depend on anything, and their gradient is
        # what rounding leaves.
        return sum(jnp.sum(y * np.random.default_rng(2).normal(size=y.shape)) for y in found), found

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def alone(drawn):
    """Return outputs and gradient of the trained factors on one device."""
    params = trained(drawn[1])
    (_, found), gradient = outputs(CFG)(params)
    return params, found, gradient


def test_a_linear_layer_adds_the_scaled_product_of_its_factors(rng):
    layer = nn.Linear(
        5,
        4,
        ("embed", "mlp"),
        rngs=nnx.Rngs(0),
        lora=config.LoraConfig(rank=2, alpha=3.0, targets=("q",)),
    )
    assert layer.lora_a.axes == ("embed", None) and layer.lora_b.axes == (None, "mlp")
    assert not np.any(layer.lora_b[...]) and np.all(layer.lora_a[...])
    layer.lora_b[...] = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    layer.bias[...] = jnp.asarray(rng.normal(size=4), jnp.float32)
    x = rng.normal(size=(3, 5)).astype(np.float32)
    kernel, a, b, bias = (
        np.asarray(p[...], np.float64)
        for p in (layer.kernel, layer.lora_a, layer.lora_b, layer.bias)
    )
    assert relative_error(layer(x), x @ kernel + 1.5 * x @ a @ b + bias) < 1e-6


def test_factors_are_float32_where_the_kernel_is_bfloat16():
    layer = nn.Linear(
        4, 4, (None, None), rngs=nnx.Rngs(0), param_dtype="bfloat16", lora=CFG.ar.lora
    )
    assert (layer.kernel.dtype, layer.lora_a.dtype, layer.lora_b.dtype) == (
        jnp.bfloat16,
        jnp.float32,
        jnp.float32,
    )


def test_factors_are_where_the_targets_say_and_the_rest_is_drawn_as_without(drawn):
    base, params = (nnx.traversals.flatten_mapping(tree) for tree in drawn)
    added = {path for path in params if path not in base}
    blocks = ("self_attention", "cross_attention")
    layers = {("ar", "layers", "attention", n) for n in "qvo"} | {("ar", "layers", "mlp", "down")}
    layers |= {("dit", "blocks", block, n) for block in blocks for n in "qkvo"}
    layers |= {("dit", "blocks", "ffn", n) for n in ("expand", "contract")}
    assert added == {(*layer, name) for layer in layers for name in lora.FACTORS}
    assert params["ar", "layers", "mlp", "down", "lora_a"].shape == (2, 64, 3)
    assert params["dit", "blocks", "ffn", "expand", "lora_b"].shape == (2, 2, 128)
    for path, x in base.items():
        np.testing.assert_array_equal(params[path], x, err_msg=path_name(path))
    a = params["ar", "layers", "mlp", "down", "lora_a"]
    assert not np.array_equal(a[0], a[1]) and 0.8 < np.std(a) * 64**0.5 < 1.2


def test_new_factors_and_zeroed_ones_leave_the_model_bit_for_bit(drawn, alone):
    """Check that a run starts at the model it is given, and that this model is recovered without
    a copy."""
    base, params = drawn
    (_, want), _ = outputs(BASE)(base)
    for tree in (params, lora.disable_lora(params | {"ar": alone[0]["ar"]})):
        (_, got), _ = outputs(CFG)(tree)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    assert min(relative_error(a, b) for a, b in zip(alone[1], want, strict=True)) > 1e-2


def test_merged_is_the_same_model_without_factors(drawn, alone):
    params, want, _ = alone
    merged = lora.merge(params, CFG)
    base_shapes, shapes = (
        jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (drawn[0], merged)
    )
    assert shapes == base_shapes and lora.base_config(CFG).ar.lora.rank == 0
    (_, got), _ = outputs(BASE)(merged)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-5
    q = {
        name: np.asarray(x, np.float64)
        for name, x in params["ar"]["layers"]["attention"]["q"].items()
    }
    sums = q["kernel"] + 2.0 * np.einsum("yir,yro->yio", q["lora_a"], q["lora_b"])
    assert relative_error(merged["ar"]["layers"]["attention"]["q"]["kernel"], sums) < 1e-6
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["ar"])
    assert (
        lora.merge({"ar": narrow}, CFG)["ar"]["layers"]["attention"]["q"]["kernel"].dtype
        == jnp.bfloat16
    )


def test_sharded_is_the_same(alone):
    """Compare eight devices, factors sharded as the kernels are; outputs and gradients to float32's
    rounding. The terms of one leaf's gradient cancel: 1.1e-5 and 1.24e-5 were measured, depending
    on the compiler's settings."""
    params, want, gradient = alone
    strategy = tiny.strategy(**tiny.MESHES["fsdp_tp"])
    variables = nnx.state(nnx.eval_shape(lambda: Blip3o(CFG, TRAINED_PARTS, seed=0)))
    placed = jax.device_put(params, strategy.parameter_shardings(variables))
    q = placed["ar"]["layers"]["attention"]["q"]
    assert [q[name].sharding.spec for name in lora.FACTORS] == [
        P(None, "fsdp", None),
        P(None, None, "tensor"),
    ]
    (_, got), cut = outputs(CFG, strategy)(placed)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-5
    for (path, a), b in zip(jax.tree.leaves_with_path(cut), jax.tree.leaves(gradient), strict=True):
        cancels = path_name(key.key for key in path).startswith(
            "dit/blocks/self_attention/q/kernel"
        )
        assert relative_error(a, b) < (2e-5 if cancels else 1e-5), path


def test_parameters_are_counted():
    run = tiny.run_config(trainable=(".*/lora_.*",))
    counts = parameter_counts.count_parameters(dataclasses.replace(run, model=CFG))
    d, f, kv = 32, 64, 16
    assert counts["ar"]["trainable"] == 2 * 3 * ((d + d) + (d + kv) + (d + d) + (f + d))
    assert counts["dit"]["trainable"] == 2 * 2 * (8 * 2 * d + (d + 2 * f) + (f + d))
    assert (
        sum(row["trainable"] for row in counts.values())
        == counts["ar"]["trainable"] + counts["dit"]["trainable"]
    )


def test_settings():
    """Check that a configuration from before the factors has none."""
    assert config.from_dict({"hidden_size": 64}, config.Qwen3Config).lora == config.LoraConfig(
        targets=config.QWEN_LINEAR
    )
    assert config.from_dict(config.to_dict(CFG), config.ModelConfig) == CFG
    overridden = config.to_config_dict(config.Config())
    overridden.model.dit.lora.rank = 8
    dit = config.from_dict(overridden).model.dit
    assert (
        dit.lora.of("expand").scale == 4.0
        and dit.lora.of("proj_out") is None
        and config.SanaConfig().lora.of("q") is None
    )
    for cls, values, message in (
        (config.Qwen3Config, {"rank": -1}, "lora.rank=-1 must lie between 0"),
        (
            config.Qwen3Config,
            {"rank": 1, "targets": ("query",)},
            "ar.lora.targets='query' is not one of q, k, v, o, gate",
        ),
        (
            config.SanaConfig,
            {"rank": 1, "targets": ()},
            "dit.lora.targets is empty: name some of q, k, v, o, expand",
        ),
        (config.SanaConfig, {"alpha": float("nan")}, "lora.alpha=nan must lie between"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            cls(lora=config.LoraConfig(**values))
