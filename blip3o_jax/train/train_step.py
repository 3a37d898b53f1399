"""Build the train step of every stage: (state, batch) -> (state, metrics), pure, compiled once.

A step whose loss, gradient or result is not finite changes nothing but its own counters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from blip3o_jax.config import Config
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.train.ema import update_average
from blip3o_jax.train.optimizer import learning_rate
from blip3o_jax.train.stages import Batch, Loss
from blip3o_jax.train.state import StatePlan, TrainState

Metrics = dict[str, jax.Array]
TOTALS = "totals"  # group of the metrics that are sums over a batch (`Loss.totals`)


def example_keys(seed: int, step: jax.Array | int, rows: int) -> jax.Array:
    """Return one key for each example of the global batch, derived from (seed, step).

    The keys do not depend on how the batch is split into micro-batches and shards.
    """
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), rows)


def _mean_gradients(
    loss_fn: Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]],
    params: Any,
    batch: Batch,
    keys_B: jax.Array,
    accumulate: int,
) -> tuple[Any, Metrics]:
    """Return gradients and metrics in float32, averaged over `accumulate` micro-batches of equal
    size.
    """
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if accumulate == 1:
        return grad_fn(params, batch, keys_B)

    # Micro-batch i takes rows i, i + accumulate, ...: every device keeps its own rows and nothing
    # is moved.
    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 1, 0)

    def add(total: Any, micro: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(lambda t, g: t + g / accumulate, total, grad_fn(params, *micro)), None

    micro_batches = jax.tree.map(cut, (batch, keys_B))
    # The metrics are summed too, and only a trace of the loss has their names.
    shapes = jax.eval_shape(grad_fn, params, *jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    # A scan holds the activations of one micro-batch at a time.
    return jax.lax.scan(add, zeros, micro_batches)[0]


def _all_finite(*trees: Any) -> jax.Array:
    """Return whether all results of a step are finite.

    With a finite gradient they can still be infinite, if the learning rate is too large.

    Compiled for four v5p chips with AdamW and fsdp, this costs one all-reduce of booleans, six
    times the bytes of a chip's parameters in memory traffic and half of them in memory; leaving out
    the moments saves none of it.
    """
    leaves = [leaf for leaf in jax.tree.leaves(trees) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]).all()


def with_normalizers(loss: Loss, batch: Batch) -> tuple[Batch, jax.Array]:
    """Return the batch with what the loss divides by, and its counts of bad records [B], or [rows,
    examples of each] where rows are packed.
    """
    batch = dict(batch)
    skipped_B = batch.pop("bad_records")
    # Counted over the whole batch, since micro-batches differ in it.
    batch |= {
        name: jnp.broadcast_to(value, skipped_B.shape)
        for name, value in loss.normalizers(batch, skipped_B.size).items()
    }
    return batch, skipped_B


def make_evaluate(
    config: Config, plan: StatePlan, strategy: Strategy, loss: Loss
) -> Callable[..., Metrics]:
    """Compile (params, frozen, batch, number of the batch) -> the loss and the stage's metrics,
    without a gradient. The random keys depend on the number alone: the losses of one batch along a
    run differ by the parameters only.
    """

    def evaluate(params: Any, frozen: Any, batch: Batch, number: jax.Array) -> Metrics:
        batch, skipped_B = with_normalizers(loss, batch)
        keys_B = example_keys(config.seed, number, skipped_B.size).reshape(skipped_B.shape)
        value, metrics = loss(plan.model(params, frozen), batch, keys_B)
        return metrics | {"loss": value}

    return strategy.jit(evaluate, out_shardings=strategy.replicated())


def make_step(
    config: Config, plan: StatePlan, strategy: Strategy, loss: Loss
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Compile the train step. Its metrics are the stage's own, the loss, the gradient norm in total
    and per part, the learning rate and the counters.
    """
    # The optimizer has its own copy of the schedule; this one is for the metric.
    schedule = learning_rate(config.optimizer, config.steps)

    def loss_fn(
        params: Any, frozen: Any, batch: Batch, keys_B: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        value, metrics = loss(plan.model(params, frozen), batch, keys_B)
        return value, metrics | {"loss": value}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        totals = loss.totals(batch)
        batch, skipped_B = with_normalizers(loss, batch)
        grads, metrics = _mean_gradients(
            lambda p, b, k: loss_fn(p, state["frozen"], b, k),
            state["params"],
            batch,
            example_keys(config.seed, state["step"], skipped_B.size).reshape(skipped_B.shape),
            config.optimizer.accumulate,
        )
        with jax.named_scope("optimizer"):
            norms = {f"grad_norm/{part}": optax.tree.norm(g) for part, g in grads.items()}
            # The global norm from the parts' norms, which are metrics anyway: no second pass over
            # the gradients.
            norm = jnp.sqrt(sum(n**2 for n in norms.values()))
            updates, opt = plan.optimizer.update(grads, state["opt"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            ema = update_average(config.optimizer, state["ema"], params)
            finite = jnp.isfinite(metrics["loss"]) & _all_finite(norm, params, opt, ema)
            keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        counters = {
            "bad_steps": jnp.where(finite, 0, state["bad_steps"] + 1),
            "skipped_steps": state["skipped_steps"] + jnp.where(finite, 0, 1),
            "bad_records": state["bad_records"] + jnp.sum(skipped_B),
        }
        # The optimizer's own count skips steps that are not applied; the metric does too.
        rate = schedule(state["step"] - state["skipped_steps"])
        metrics |= norms | counters | {"grad_norm": norm, "learning_rate": rate}
        metrics |= {f"{TOTALS}/{name}": value for name, value in totals.items()}
        return {
            "params": keep(params, state["params"]),
            "frozen": state["frozen"],
            "opt": keep(opt, state["opt"]),
            "ema": keep(ema, state["ema"]),
            "step": state["step"] + 1,
            **counters,
        }, metrics

    # On CPUs XLA copies donated arrays after the step has written its results elsewhere: a second
    # state is cheaper there.
    donated = () if strategy.mesh.devices.flat[0].platform == "cpu" else (0,)
    return strategy.jit(
        step, donate_argnums=donated, out_shardings=(plan.shardings, strategy.replicated())
    )
