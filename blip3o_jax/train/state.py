"""Create the train state, which checkpoints hold, with its shardings on the mesh.

params         trainable parameters          {"ar": {...}, "connector": {...}, ...}
frozen         all other parameters, without gradients or optimizer state
opt            optimizer state of `params`
ema            exponential moving average of `params`, or {}
step           int32, steps done
bad_steps      int32, steps in a row that were not applied for a non-finite loss or gradient
skipped_steps  int32, all steps that were not applied
bad_records    int32, records skipped because they could not be read
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from blip3o_jax.blip3o import MODEL_PARTS, Blip3o, split
from blip3o_jax.config import Config, ConfigError, check_choice
from blip3o_jax.parallel.rules import Parameter, Strategy
from blip3o_jax.train.ema import initial_average
from blip3o_jax.train.freezing import trainable_filter
from blip3o_jax.train.optimizer import make_optimizer
from blip3o_jax.train.stages import stage_parts

TrainState = dict[str, Any]
WEIGHTS = ("params", "frozen")
COUNTERS = ("step", "bad_steps", "skipped_steps", "bad_records")


@dataclasses.dataclass(frozen=True)
class StatePlan:
    """Hold the abstract state: graph definition, shapes, shardings and the optimizer."""

    graphdef: Any
    abstract: TrainState  # ShapeDtypeStructs with shardings
    shardings: TrainState
    optimizer: optax.GradientTransformation

    def model(self, params: Any, frozen: Any) -> Blip3o:
        return nnx.merge(self.graphdef, params, frozen)


def run_strategy(config: Config, devices: Sequence[jax.Device] | None = None) -> Strategy:
    """Return the strategy and mesh of a run: of `config.mesh`, with what it leaves open chosen for
    the stage's parameters and the rows of a micro-batch. Raises ConfigError if they do not fit.
    """

    def parameters() -> list[Parameter]:
        model = nnx.eval_shape(lambda: _build(config))
        variables = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return [(str(path[0]), variable.axes, variable.shape) for path, variable in variables]

    return Strategy.of(
        config.mesh,
        devices,
        parameters=parameters,
        # Only the networks of the joint stage shard the tokens of a row.
        rows=config.data.batch_size // (config.optimizer.accumulate * config.data.pack)
        if config.stage == "joint"
        else 0,
    )


def _build(config: Config, parts: Iterable[str] | None = None) -> Blip3o:
    return Blip3o(config.model, parts or stage_parts(config), seed=config.seed)


def _by_group(config: Config, model: Blip3o) -> TrainState:
    _, params, frozen = split(model, trainable_filter(config))
    return {"params": nnx.to_pure_dict(params), "frozen": nnx.to_pure_dict(frozen)}


def _initialize_part(
    config: Config,
    plan: StatePlan,
    part: str,
    taken: TrainState,
    options: dict[str, Any],
) -> TrainState:
    """Return the initial weights of `part` without those in `taken`, each array made in its own
    shards.
    """

    def own(tree: TrainState) -> TrainState:
        parts = {
            group: {part: tree[group][part]} if part in tree[group] else {} for group in WEIGHTS
        }
        return {group: without(parts[group], taken[group]) for group in WEIGHTS}

    at = own(plan.shardings)
    if not jax.tree.leaves(at):
        return at
    initialize = lambda: own(_by_group(config, _build(config, (part,))))
    # jit with `out_shardings`: every device creates its shards only, from the same key.
    return jax.jit(initialize, out_shardings=at, compiler_options=options)()


def _initial_optimizer_state(
    config: Config, optimizer: optax.GradientTransformation, params: Any
) -> TrainState:
    """Return the initial optimizer state, EMA and counters."""
    return {
        "opt": optimizer.init(params),
        "ema": initial_average(config.optimizer, params),
    } | {name: jnp.zeros((), jnp.int32) for name in COUNTERS}


def _optimizer_shardings(
    state: Any, params: Any, params_at: Any, replicated: jax.NamedSharding
) -> Any:
    """Return the shardings of an optimizer's state: an array of a parameter's shape is placed like
    the parameter, a factor of it (one dimension less, as in Adafactor) like the remaining
    dimensions, and all others, such as counters, are replicated.

    An array belongs to the parameter whose path is a suffix of its own path.
    """
    at = dict(jax.tree.leaves_with_path(params_at))
    placed = {path: (x.shape, at[path]) for path, x in jax.tree.leaves_with_path(params)}

    def sharding(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.NamedSharding:
        # Optax nests the parameters' tree below its own names ("mu", "nu", ...).
        parameter = next((placed[path[i:]] for i in range(len(path)) if path[i:] in placed), None)
        if parameter is None:
            return replicated
        shape, where = parameter
        if x.shape == shape:
            return where
        spec = (*where.spec, *[None] * (len(shape) - len(where.spec)))
        # Adafactor stores the mean over one dimension: the shape without it.
        for i in range(len(shape)):
            if x.shape == shape[:i] + shape[i + 1 :]:
                return jax.NamedSharding(where.mesh, jax.P(*spec[:i], *spec[i + 1 :]))
        return replicated

    return jax.tree_util.tree_map_with_path(sharding, state)


def plan_state(config: Config, strategy: Strategy) -> StatePlan:
    """Return shapes and shardings of the whole state; nothing is allocated."""
    for part, _ in strategy.parts:
        check_choice("mesh.parts: part", part, MODEL_PARTS)
    optimizer = make_optimizer(config.optimizer, config.steps)
    graphdef, params, frozen = nnx.eval_shape(
        lambda: split(_build(config), trainable_filter(config))
    )
    if not jax.tree.leaves(params):
        raise ConfigError(
            f"trainable={config.trainable!r} matches no parameter of stage {config.stage!r}"
        )
    shapes = {"params": nnx.to_pure_dict(params), "frozen": nnx.to_pure_dict(frozen)}
    # Shapes alone, so that planning a model of any size costs no memory.
    shapes |= jax.eval_shape(
        lambda params: _initial_optimizer_state(config, optimizer, params), shapes["params"]
    )
    params_at = strategy.parameter_shardings(params)
    frozen_at = strategy.parameter_shardings(frozen)
    replicated = strategy.replicated()
    shardings = {
        "params": params_at,
        "frozen": frozen_at,
        "opt": _optimizer_shardings(shapes["opt"], shapes["params"], params_at, replicated),
        "ema": params_at if config.optimizer.ema_decay else {},
    } | dict.fromkeys(COUNTERS, replicated)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return StatePlan(graphdef, abstract, shardings, optimizer)


def create_state(
    config: Config,
    plan: StatePlan,
    given: Mapping[str, Any] | None = None,
    image_token_offset: int | None = None,
) -> TrainState:
    """Create the initial state, each array in its own sharding: no device ever holds an unplanned
    replica.

    `given` parts, {part: {"params": ..., "frozen": ...}} as in the plan, are taken as they are;
    missing arrays are initialized as they would be without them. If
    `checkpoint.image_embedding_init` is "codes", `image_token_offset`, the vocabulary id of the
    first codebook entry, is required, and the AR's image rows are set from the codes even if the AR
    is given. Raises ValueError without it.
    """
    if config.checkpoint.image_embedding_init == "codes" and image_token_offset is None:
        raise ValueError(
            "create_state: checkpoint.image_embedding_init='codes' needs image_token_offset"
        )
    taken = {
        group: {part: tree[group] for part, tree in (given or {}).items() if group in tree}
        for group in WEIGHTS
    }
    # The programs run once. XLA's CPU compiler spends long on optimizing random numbers, which
    # does not pay here.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    weights = taken
    # A program for each part: XLA's CPU compiler takes time that grows with the square of the
    # number of random arrays, and the compile cache gives a part to every run that has it.
    for part in stage_parts(config):
        weights = merge_trees(weights, _initialize_part(config, plan, part, taken, options))
    if config.checkpoint.image_embedding_init == "codes" and image_token_offset is not None:
        ar = lambda tree: {group: tree[group]["ar"] for group in WEIGHTS if "ar" in tree[group]}

        def at_codes(weights: TrainState) -> TrainState:
            model = plan.model(weights["params"], weights["frozen"])
            model.init_image_embeddings_from_codes(image_token_offset, config.seed)
            return ar(_by_group(config, model))

        started = jax.jit(at_codes, out_shardings=ar(plan.shardings), compiler_options=options)(
            weights
        )
        for group, tree in started.items():
            weights[group]["ar"] = tree
    rest_at = {name: at for name, at in plan.shardings.items() if name not in WEIGHTS}
    rest = jax.jit(
        lambda params: _initial_optimizer_state(config, plan.optimizer, params),
        out_shardings=rest_at,
        compiler_options=options,
    )
    return weights | rest(weights["params"])


def merge_trees(a: Any, b: Any) -> Any:
    """Return the union of two nested dicts without a common leaf."""
    if not isinstance(a, dict):
        return a
    return a | {k: merge_trees(a[k], v) if k in a else v for k, v in b.items()}


def without(a: Any, b: Any) -> Any:
    """Return the leaves of a nested dict `a` whose paths are absent from `b`."""
    rest = {}
    for key, value in a.items():
        if key not in b:
            rest[key] = value
        elif isinstance(value, dict) and (inner := without(value, b[key])):
            rest[key] = inner
    return rest


@functools.cache
def _finite(where: Any) -> Callable[[list[Any]], jax.Array]:
    """Return a compiled function: arrays -> whether each is finite, as one array with sharding
    `where`.
    """
    return jax.jit(
        lambda leaves: jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]),
        out_shardings=where,
    )


def not_finite(state: TrainState) -> list[str]:
    """Return the names of the arrays of the trained part of a state that are not finite."""
    trained = {group: state[group] for group in ("params", "opt", "ema") if group in state}
    named = [
        (jax.tree_util.keystr(keys, simple=True, separator="/"), leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(trained)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if not named:
        return []
    at = getattr(named[0][1], "sharding", None)
    # On every device, so that each of several hosts can read it.
    everywhere = jax.NamedSharding(at.mesh, jax.P()) if isinstance(at, jax.NamedSharding) else None
    finite = jax.device_get(_finite(everywhere)([leaf for _, leaf in named]))
    return [name for (name, _), fine in zip(named, finite, strict=True) if not fine]
