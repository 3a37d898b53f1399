"""Find arrays that a program should not hold, in programs that hold them and in programs that do
not."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax.bench.cost import hlo
from blip3o_jax.bench.sharding.buffers import Logits, largest, unsharded
from blip3o_jax.bench.sharding.train_step import TrainStep
from blip3o_jax.config import MeshConfig
from blip3o_jax.parallel.rules import Strategy
from tests import tiny

LAYERS, WIDTH = 3, 32


@pytest.fixture(scope="module")
def at():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=jax.devices()[:4], axis_types=auto)
    return lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))


def program(f, *args):
    return hlo.parse(jax.jit(f).lower(*args).compile().as_text())


@pytest.mark.parametrize("hoisted", [False, True])
@pytest.mark.parametrize(("tensor", "held"), [(None, 24), ("tensor", 12)])
def test_layers_are_gathered_one_by_one(at, hoisted, tensor, held):
    """Pass a loop its weights whole, which gathers all of them before; dimensions over `tensor`
    stay sharded."""
    stack = jax.ShapeDtypeStruct(
        (LAYERS, WIDTH, 24), jnp.float32, sharding=at(None, "fsdp", tensor)
    )
    x = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32, sharding=at("fsdp"))
    pin = jax.lax.with_sharding_constraint

    def layer(x, w):
        y = pin(jnp.tanh(x @ pin(w, at(None, tensor))), at("fsdp", tensor))
        return pin(jnp.pad(y, ((0, 0), (0, WIDTH - 24))), at("fsdp")), None

    def f(w, x):
        return jax.lax.scan(layer, x, pin(w, at(None, None, tensor)) if hoisted else w)[0]

    found = unsharded(program(f, stack, x), {"ar": {"up": stack}})
    if not hoisted:
        assert found == []
    else:
        assert found and all(
            line.startswith("all layers of ar/up are gathered at once: f32") for line in found
        )
        assert any(str(held) in line for line in found)


def test_what_lies_over_tensor_is_not_gathered_either(at):
    """Check layers and logits: their columns of one device, and all of them."""
    stack = jax.ShapeDtypeStruct(
        (LAYERS, WIDTH, 24), jnp.float32, sharding=at(None, None, "tensor")
    )
    made = program(jax.jit(lambda w: w * 2, out_shardings=at()), stack)
    assert [
        line
        for line in unsharded(made, {"up": stack})
        if "all layers of up are gathered at once" in line
    ]
    x = jax.ShapeDtypeStruct((16, 96), jnp.float32, sharding=at(None, "tensor"))
    logits = Logits(positions=16, columns=48, vocabulary=96, width=WIDTH)
    for where, held in ((at(None, "tensor"), "f32[16,48]"), (at(), "f32[16,96]")):
        made = program(jax.jit(lambda x: x * 2, out_shardings=where), x)
        assert largest(made)[0]["array"] == held and unsharded(made, {}, logits)
    assert (
        unsharded(program(lambda x: x[:8] * 2, x), {}, dataclasses.replace(logits, positions=17))
        == []
    )


@pytest.mark.parametrize("by_columns", [True, False])
def test_a_table_is_looked_up_where_its_columns_lie(at, by_columns):
    """Check that neither the table nor its gradient is gathered. As the head of a model it may be,
    in the dtype of the products."""
    table = jax.ShapeDtypeStruct((40, WIDTH), jnp.float32, sharding=at(None, "fsdp"))
    rows = at(("tensor", "fsdp"))
    ids = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=rows)
    pin = jax.lax.with_sharding_constraint

    def f(table, ids):
        looked_up = (
            pin(table[pin(ids, at("tensor"))], at("tensor", "fsdp"))
            if by_columns
            else pin(table, at())[ids]
        )
        x = pin(looked_up, rows)
        return jnp.sum(jnp.tanh(x) * jnp.arange(8.0)[:, None])

    gradient = program(jax.jit(jax.grad(f), out_shardings=at(None, "fsdp")), table, ids)
    found = unsharded(gradient, {"ar": {"embedding": table}})
    assert bool(found) != by_columns, found
    assert all(
        line.startswith("ar/embedding or its gradient is held whole by") and "[40, 32]" in line
        for line in found
    )
    assert unsharded(gradient, {"ar": {"embedding": table}}, products="float32") == []


def test_what_layers_keep_of_a_row_is_no_weight(at):
    """Use one row of as many tokens as the weights are wide."""
    stack = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=at(None, "fsdp"))
    kept = jax.ShapeDtypeStruct((LAYERS, 1, WIDTH, WIDTH), jnp.float32, sharding=at())
    assert unsharded(program(lambda x: x + 1, kept), {"up": stack}) == []


@pytest.mark.parametrize("blocks", [1, 4])
def test_logits_are_taken_in_blocks(at, blocks):
    hidden = jax.ShapeDtypeStruct((16, WIDTH), jnp.float32, sharding=at())
    head = jax.ShapeDtypeStruct((WIDTH, 96), jnp.float32, sharding=at())

    def f(hidden, head):
        block = lambda total, h: (total + jax.nn.logsumexp(h @ head, axis=-1).sum(), None)
        return jax.lax.scan(
            block, 0.0, hidden.reshape(blocks, 16 // blocks, WIDTH), unroll=blocks == 1
        )[0]

    found = unsharded(
        program(f, hidden, head), {}, Logits(positions=16, columns=96, vocabulary=96, width=WIDTH)
    )
    assert bool(found) == (blocks == 1) and all(
        "logits of all 16 positions" in line for line in found
    )


def test_the_largest_arrays_come_first(at):
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=at())
    first, *rest = largest(program(lambda x: (x @ x).sum(axis=1), x))
    assert (first["array"], first["bytes"]) == ("f32[64,64]", 64 * 64 * 4)
    assert all(array["bytes"] <= first["bytes"] for array in rest)


def test_logits_of_a_train_step():
    """Put 4 of 8 rows on each of 2 x 2 devices; the vocabulary is split in two, and a block's whole
    logits are no fault."""
    config = dataclasses.replace(
        tiny.run_config(), data=dataclasses.replace(tiny.run_config().data, batch_size=8)
    )
    mesh = MeshConfig(strategy="fsdp_tp", fsdp=2, tensor=2)
    strategy = Strategy.of(mesh, jax.devices()[:4])
    blocks = dataclasses.replace(config, loss=dataclasses.replace(config.loss, ce_chunk=2))
    logits = TrainStep(blocks, strategy).logits
    assert logits.vocabulary == 2 * logits.columns == config.model.ar.padded_vocab_size
    assert logits.positions % 4 == 0 and logits.positions >= 4 * config.model.tokenizer.num_tokens
    everything = dataclasses.replace(
        config, loss=dataclasses.replace(config.loss, ce_chunk=config.data.max_length)
    )
    assert TrainStep(everything, strategy).logits is None
