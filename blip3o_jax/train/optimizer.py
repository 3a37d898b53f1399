"""Optimizers and schedules of optax by name, with global-norm clipping and masked weight decay.

`optimizer.name` is any function of `optax` that makes an optimizer of a learning rate (adamw, lion,
adafactor, sgd, ...), or "muon", and `optimizer.schedule.name` any of its schedules. Their further
arguments are `optimizer.kwargs` and `optimizer.schedule.kwargs`; what these leave out has optax's
defaults, and for AdamW and Muon the settings b1, b2, eps and muon_beta.

"muon" orthogonalises the momentum of every matrix of the layer stacks (`optax.contrib.muon`) and
leaves the rest to AdamW: linear layers outside of stacks, embeddings, heads, convolutions, norms
and biases. Its updates have the root mean square of AdamW's (arXiv 2502.16982, sec. 2.2), so that
one learning rate serves both.

Weight decay leaves out norms, biases and single numbers (logit scale and bias), as the trainer of
transformers does (`Trainer.get_decay_parameter_names`); embeddings are decayed there and here.
"""

import contextlib
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blip3o_jax.config import ConfigError, OptimizerConfig, check, check_choice
from blip3o_jax.config.constraints import Bounds
from blip3o_jax.config.errors import not_a_choice, type_and_line
from blip3o_jax.config.fields import convert
from blip3o_jax.config.train import MAX_LEARNING_RATE
from blip3o_jax.config.types import Count, Decay, NonNegative

# Kernels [layers, in, out]: each layer's matrix is orthogonalised separately.
_STACKED_MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
# Last names of the parameters that are not decayed: the scales of all norms are called "scale".
_NOT_DECAYED = ("scale", "bias", "log_scale")
_MASK = ("mask", "weight_decay_mask")
_MOMENT_DTYPE = ("mu_dtype", "dtype_momentum", "accumulator_dtype")
_OWN_SETTINGS = ("b1", "b2", "eps", "muon_beta")  # of "adamw" and "muon" alone
# Set by this module from the settings, so that `optimizer.kwargs` cannot have them too.
_FROM_SETTINGS = {
    "adamw": ("b1", "b2", "eps"),
    "muon": ("beta", "eps", "weight_decay", "muon_weight_dimension_numbers", "consistent_rms"),
}
# What arguments of these names may be, in any optimizer of optax.
_BOUNDED: dict[str, Any] = {
    **dict.fromkeys(("b1", "b2", "b3", "decay", "momentum", "rho"), Decay),
    **dict.fromkeys(("eps", "eps_root"), NonNegative),
    "ns_steps": Annotated[int, Bounds(1, 100)],  # iterations of each step
}
_Number = Annotated[float, Bounds(-1e12, 1e12)]
# Their arguments are other schedules, which no setting can hold.
_NO_SCHEDULES = ("join_schedules", "scale_by_schedule", "sgdr_schedule")


@functools.cache
def optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Return the optimizers by name: those of optax that take a learning rate, and "muon"."""
    found = {}
    for name, make in vars(optax).items():
        # optax makes some by functools.partial (nadamw). scale_by_learning_rate takes a rate too,
        # and is a part of optimizers.
        makes_one = inspect.isfunction(make) or isinstance(make, functools.partial)
        if makes_one and not name.startswith(("_", "scale_by")) and "learning_rate" in _takes(make):
            found[name] = make
    return dict(sorted(found.items())) | {"muon": optax.contrib.muon}


@functools.cache
def schedules() -> dict[str, Callable[..., optax.Schedule]]:
    """Return the schedules of optax by name."""
    return {
        name: make
        for name, make in vars(optax).items()
        if inspect.isfunction(make)
        and (name.endswith("_schedule") or name == "exponential_decay")
        and name not in _NO_SCHEDULES
    }


def check_arguments(cfg: OptimizerConfig) -> None:
    """Raise ConfigError for a name, an argument or an argument's value that optax does not take.

    It looks at signatures alone and asks for no devices, so a command can call it before all else.
    """
    check_choice("optimizer.name", cfg.name, optimizers())
    _keywords("optimizer.kwargs", cfg.name, cfg.kwargs, _free_arguments(cfg.name))
    schedule = cfg.schedule
    check_choice("optimizer.schedule.name", schedule.name, schedules())
    takes = _takes(schedules()[schedule.name])
    _keywords("optimizer.schedule.kwargs", schedule.name, schedule.kwargs, takes)


def learning_rate(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the schedule: step -> learning rate.

    The arguments that `schedule.kwargs` leaves out come from the settings: the highest value
    (`peak_value`, or `init_value` and `value` where there is no warm-up) is `learning_rate`, the
    last is `end_learning_rate`, warm-up takes `warmup_fraction` of `steps`, and the decay ends at
    `steps`. Raises ConfigError for an unknown name or argument.
    """
    schedule = cfg.schedule
    check_choice("optimizer.schedule.name", schedule.name, schedules())
    make = schedules()[schedule.name]
    takes = _takes(make)
    given = _keywords("optimizer.schedule.kwargs", schedule.name, schedule.kwargs, takes)
    if isinstance(given.get("boundaries_and_scales"), tuple):
        with _one_line("optimizer.schedule.kwargs: boundaries_and_scales"):
            given["boundaries_and_scales"] = {
                int(step): float(scale) for step, scale in given["boundaries_and_scales"]
            }
    warmup = max(1, round(cfg.warmup_fraction * steps))
    derived = {
        "value": cfg.learning_rate,
        "peak_value": cfg.learning_rate,
        "init_value": 0.0 if "peak_value" in takes else cfg.learning_rate,
        "end_value": cfg.end_learning_rate,
        "warmup_steps": warmup,
        # optax counts the warm-up as a part of these steps, and needs at least one more.
        "decay_steps": max(steps, warmup + 1) if "warmup_steps" in takes else steps,
        "transition_steps": max(1, steps - warmup) if "warmup_steps" in takes else steps,
    }
    arguments = {name: value for name, value in derived.items() if name in takes} | given
    missing = [name for name, p in takes.items() if p.default is p.empty and name not in arguments]
    check(
        not missing,
        f"optimizer.schedule.kwargs must give {', '.join(missing)}: {schedule.name} has no default",
    )
    with _one_line(f"optimizer.schedule: optax.{schedule.name}"):
        made = make(**arguments)
        # Most arguments of a schedule have no bounds; its values have those of a learning rate.
        # Checked at the start, at the end of warm-up and at eighths of the run.
        points = sorted({0, 1, warmup, *(steps * part // 8 for part in range(9))})
        with _computing_now():
            values = [float(made(jnp.asarray(step, jnp.int32))) for step in points]
    for step, value in zip(points, values, strict=True):
        check(
            # A decay to a bound may end a rounding beyond it.
            -1e-9 <= value <= MAX_LEARNING_RATE * (1 + 1e-6),
            f"optimizer.schedule: optax.{schedule.name} gives a learning rate of {value:g} at step "
            f"{step} of {steps}: choose kwargs that keep it between 0 and {MAX_LEARNING_RATE:g}",
        )
    return made


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return the transformation of gradients of a run of `steps` steps.

    Raises ConfigError for an unknown name or argument, and for a setting that the optimizer has no
    argument for.
    """
    rate = learning_rate(cfg, steps)
    check_choice("optimizer.name", cfg.name, optimizers())
    # Before the optimizer: moments see clipped gradients.
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    if cfg.name == "muon":
        main = {"muon": _muon(cfg, rate), "adamw": _made(cfg, rate, "adamw", _adamw(cfg))}
        return optax.chain(clip, optax.partition(main, _labels))
    own = _adamw(cfg) if cfg.name == "adamw" else {}
    return optax.chain(clip, _made(cfg, rate, cfg.name, own, cfg.kwargs))


def decayed(params: Any) -> Any:
    """Return a tree of bools like `params`: whether weight decay applies to the parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in _NOT_DECAYED, params
    )


def _adamw(cfg: OptimizerConfig) -> dict[str, Any]:
    return {"b1": cfg.b1, "b2": cfg.b2, "eps": cfg.eps}


def _made(
    cfg: OptimizerConfig,
    rate: optax.Schedule,
    name: str,
    own: Mapping[str, Any],
    kwargs: tuple[tuple[str, Any], ...] = (),
) -> optax.GradientTransformation:
    """Return optax's optimizer `name` with the settings `own` and the arguments `kwargs`."""
    make = optimizers()[name]
    takes = _takes(make)
    arguments = {"learning_rate": rate, **own}
    masks = [argument for argument in _MASK if argument in takes]
    arguments |= dict.fromkeys(masks, decayed)
    if masks and "weight_decay" in takes:
        arguments["weight_decay"] = cfg.weight_decay
    else:
        check(
            not cfg.weight_decay,
            f"optimizer.weight_decay={cfg.weight_decay:g}: optax.{name} has no weight decay that "
            "leaves out norms and biases; set it to 0",
        )
    arguments |= _moment_dtype(cfg, name, takes)
    if not own:
        _check_own_settings(cfg)
    arguments |= _keywords("optimizer.kwargs", name, kwargs, _free_arguments(name))
    with _one_line(f"optimizer: optax.{name}"):
        made = make(**arguments)
        # AdamW's own settings have bounds, which were checked; only an update shows what other
        # arguments do.
        if kwargs or not own:
            _check_update(made, {"kernel": _probe((2, 3, 4)), "scale": _probe((6,))})
    return made


def _muon(cfg: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    takes = _takes(optax.contrib.muon)
    arguments = {
        "learning_rate": rate,
        "beta": cfg.muon_beta,
        "eps": cfg.eps,
        "weight_decay": cfg.weight_decay,
        "muon_weight_dimension_numbers": lambda params: jax.tree.map(
            lambda _: _STACKED_MATRIX, params
        ),
        # The root mean square of AdamW's updates (arXiv 2502.16982, sec. 2.2).
        "consistent_rms": 0.2,
    } | _moment_dtype(cfg, "muon", takes)
    arguments |= _keywords("optimizer.kwargs", "muon", cfg.kwargs, _free_arguments("muon"))
    with _one_line("optimizer: optax.contrib.muon"):
        made = optax.contrib.muon(**arguments)
        if cfg.kwargs:
            _check_update(made, {"layers": {"kernel": _probe((2, 3, 4))}})
    return made


def _free_arguments(name: str) -> dict[str, inspect.Parameter]:
    """Return the arguments of an optimizer that `optimizer.kwargs` may give."""
    takes = _takes(optimizers()[name])
    taken = {"learning_rate", *_MASK, *_MOMENT_DTYPE, *_FROM_SETTINGS.get(name, ())}
    if any(mask in takes for mask in _MASK):
        taken.add("weight_decay")
    # optax's Muon contains an AdamW for other parameters, which is unused here (`_labels`).
    return {
        argument: parameter
        for argument, parameter in takes.items()
        if argument not in taken and not (name == "muon" and argument.startswith("adam_"))
    }


def _moment_dtype(
    cfg: OptimizerConfig, name: str, takes: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """Return the argument that sets the dtype of the first moment, {} where it is left as it is."""
    if cfg.mu_dtype is None:
        return {}
    argument = next((a for a in _MOMENT_DTYPE if a in takes), None)
    if argument is None:
        raise ConfigError(
            f"optimizer.mu_dtype={cfg.mu_dtype!r}: optax.{name} keeps its moments in the"
            " parameters' dtype; leave it None"
        )
    return {argument: cfg.mu_dtype}


def _check_own_settings(cfg: OptimizerConfig) -> None:
    """Raise ConfigError where a setting of AdamW or Muon is changed that this optimizer ignores."""
    defaults = OptimizerConfig()
    for name in _OWN_SETTINGS:
        value = getattr(cfg, name)
        check(
            value == getattr(defaults, name),
            f"optimizer.{name}={value:g} is for adamw and muon; give the arguments of {cfg.name} "
            f"in optimizer.kwargs",
        )


def _keywords(
    field: str,
    owner: str,
    kwargs: tuple[tuple[str, Any], ...],
    takes: Mapping[str, inspect.Parameter],
) -> dict[str, Any]:
    """Return `kwargs` as a dict. ConfigError that names the nearest argument for one that `takes`
    does not have, and for a value that is not of the argument's kind or beyond its bounds.
    """
    for name, value in kwargs:
        if name not in takes:
            raise ConfigError(f"{field}: argument {name!r} of {owner} {not_a_choice(name, takes)}")
        hint = _BOUNDED.get(name) or _kind(takes[name])
        if hint and not (value is None and takes[name].default is None):
            convert(value, hint, f"{field}: {owner}'s {name}")
    return dict(kwargs)


def _kind(parameter: inspect.Parameter) -> Any:
    """Return the annotation, as of a setting, of what an argument of optax takes; None where its
    signature does not say: then optax itself has to refuse a wrong value.
    """
    annotation, default = parameter.annotation, parameter.default
    choices = {annotation, *typing.get_args(annotation)}
    if isinstance(default, bool):
        return bool
    # optax writes ArrayLike for most numbers, which is a union with np.ndarray, int and float.
    if choices & {float, np.ndarray}:
        return _Number
    if int in choices:
        return Count
    return str if isinstance(default, str) or annotation is str else None


def _takes(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(make).parameters


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Convert an exception of optax for an argument's value to a ConfigError of one line."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{what}: {type_and_line(error)}") from error


@contextlib.contextmanager
def _computing_now() -> Iterator[None]:
    """Compute on values, wherever this is called: also while a function is traced, and where the
    training loop forbids transfers between host and devices.
    """
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        yield


def _probe(shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers of several magnitudes and both signs, 0 among them."""
    return np.resize(np.asarray([0.0, 1e-6, -1.0, 100.0, -1e-3, 0.5], np.float32), shape)


def _check_update(optimizer: optax.GradientTransformation, params: Any) -> None:
    """Raise unless three updates with finite gradients give finite parameters and state. Some
    arguments are looked at no earlier; some optimizers (lbfgs) ask for more than gradients; and
    others divide by what an argument makes 0, or take the root of what it makes negative.
    """
    # An error of shapes and arguments comes sooner, and in fewer words, without values.
    with jax.transfer_guard("allow"):
        state = jax.eval_shape(optimizer.init, params)
        jax.eval_shape(optimizer.update, params, state, params)
    with _computing_now():
        params = start = jax.tree.map(jnp.asarray, params)
        state = optimizer.init(params)
        # Gradients that change: an average of equal ones hides negative weights.
        for scale in (1.0, -0.01, 1.0):
            gradients = jax.tree.map(lambda x, scale=scale: scale * x, start)
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        leaves = [
            leaf
            for leaf in jax.tree.leaves((params, state))
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)
    if not finite:
        raise ConfigError(
            "an update with a finite gradient is not finite: change optimizer.kwargs, or "
            "optimizer.learning_rate"
        )


def _labels(params: Any) -> Any:
    """Return the optimizer's label for each parameter: "muon" or "adamw"."""

    def label(path: tuple[Any, ...], x: jax.Array) -> str:
        return "muon" if path[-1].key == "kernel" and x.ndim == 3 else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)
