"""Reject a training run whose state or batch cannot fit, before anything is allocated or compiled.

Bytes are counted per device: parameters, gradients, optimizer state and averages exactly as the
plan places them; of the batch the arrays that no schedule avoids, which are the examples' pixels
and tokens, the layer inputs kept for the backward pass, and attention scores where they are
materialized.
"""

import collections
import math
from collections.abc import Iterator
from typing import Any

import jax

from blip3o_jax import nn
from blip3o_jax.blip3o import MODEL_PARTS
from blip3o_jax.config import Config, fields
from blip3o_jax.parallel.memory import Need, check_fits, device_bytes
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.train.stages import STAGES
from blip3o_jax.train.state import StatePlan

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_memory(config: Config, plan: StatePlan, strategy: Strategy) -> None:
    """Raise ConfigError that names the setting that is too large for the devices of `strategy`."""
    needs = state_needs(config, plan)
    # In RL the arrays are those of a rollout, and the gradient may leave out whole networks, so
    # that the counts below would not be lower bounds.
    if not config.rl.rewards:
        needs += batch_needs(config, plan, strategy)
    check_fits(needs, device_bytes(strategy.mesh.local_devices))


def state_needs(config: Config, plan: StatePlan) -> list[Need]:
    """Return a need for each part of the model."""
    counts: collections.Counter[str] = collections.Counter()
    for keys, leaf in jax.tree_util.tree_leaves_with_path(plan.abstract):
        names = [getattr(key, "key", None) for key in keys]
        part = next((name for name in names if name in MODEL_PARTS), None)
        if part is None:
            continue
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        # The gradients of all that is trained exist at once: they are clipped by their common norm.
        counts[part] += shard * (2 if names[0] == "params" else 1)
    remedy = "make it smaller, or lay it over more devices (mesh.fsdp)"
    return [Need(_outstanding(config, part), count, remedy) for part, count in counts.items()]


def _outstanding(config: Config, part: str) -> str:
    """Return the setting of a part that exceeds its default by the largest factor, which is
    probably the one set too high.
    """
    group = getattr(config.model, part, None)
    if group is None:
        return f"part {part} of the model"
    found = [
        (value / max(1, default), name, value)
        for name, value, default in _sizes(group, type(group)(), f"model.{part}")
    ]
    ratio, name, value = max(found, default=(0, "", 0))
    return f"{name}={value}" if ratio > 1 else f"model.{part}"


def _sizes(group: Any, default: Any, path: str) -> Iterator[tuple[str, int, int]]:
    """Yield (name, value, default) of the whole numbers of a group and of its subgroups."""
    cls: type = type(group)
    for name in fields.field_types(cls):
        value = getattr(group, name)
        usual = getattr(default, name)
        if isinstance(value, int) and not isinstance(value, bool):
            yield fields.join(path, name), value, usual
        elif isinstance(value, tuple) and value and all(type(v) is int for v in value):
            yield fields.join(path, name), max(value), max(usual)
        elif fields.is_group(type(value)):
            yield from _sizes(value, usual, fields.join(path, name))


def batch_needs(config: Config, plan: StatePlan, strategy: Strategy) -> list[Need]:
    """Return the need of the batch, attributed to its size, or to the setting that makes a single
    example too large.
    """
    shards = strategy.batch_shards
    batch = config.data.batch_size / shards
    micro = batch / config.optimizer.accumulate
    given, kept = example_bytes(config, plan, strategy)
    each = given + sum(kept.values())
    room = device_bytes(strategy.mesh.local_devices)
    if room is not None and each > room:
        setting = max(kept, key=kept.__getitem__)
        return [Need(setting, max(1, micro) * each, "make it smaller")]
    fits = (
        ""
        if room is None
        else f"at most {max(1, int(room / each)) * shards} fit without the model, "
    )
    setting = f"data.batch_size={config.data.batch_size}"
    # The contrastive loss has a float32 term for every pair of a device's images with the captions
    # of all devices.
    pairs = 4.0 * micro * micro * shards if config.stage == "contrastive" else 0.0
    need = batch * given + micro * (each - given) + pairs
    if pairs:
        fits = "make it smaller, "
    return [Need(setting, need, f"{fits}or raise optimizer.accumulate")]


def example_bytes(
    config: Config, plan: StatePlan, strategy: Strategy
) -> tuple[float, dict[str, float]]:
    """Return (bytes of an example's arrays, {setting: bytes kept for its training step}) on the
    device that holds it.
    """
    model = config.model
    names = STAGES[config.stage].fields
    trained = set(plan.abstract["params"])
    pixels = model.image_size**2 * 3
    seen = model.tokenizer.image_size**2 * 3
    length = config.data.max_length
    cached = config.stage == "joint" and bool(config.data.cache_dir)
    given = 0.0 if cached else pixels * ("pixels" in names) + seen * ("tokenizer_pixels" in names)
    kept: dict[str, float] = {}
    if "pixels" in names and not cached:
        kept[f"model.image_size={model.image_size}"] = 4.0 * pixels
    if "tokenizer_pixels" in names and not cached:
        encoder = model.tokenizer.encoder_sizes
        learns = "tokenizer" in trained and config.stage == "contrastive"
        values = encoder.patches * encoder.width * (encoder.layers if learns else 1)
        scores = 4.0 * encoder.heads * encoder.patches**2
        kept[encoder.setting] = float(values * _BYTES[encoder.dtype]) + scores
    if config.stage == "joint":
        rows = 1 / config.data.pack
        among = strategy.mesh.shape["sequence"]
        given += 16.0 * length * rows
        layers = (
            model.ar.num_hidden_layers if "ar" in trained and model.ar.remat != "offload" else 1
        )
        row = _layers(model.ar, length, layers)
        if _materializes_scores(config):
            row += 4.0 * model.ar.num_attention_heads * length**2 / strategy.mesh.shape["tensor"]
        kept[f"data.max_length={length}"] = row * rows / among
        tokens = (model.latent_size // model.dit.patch_size) ** 2 * config.loss.flow_samples
        layers = model.dit.num_layers if model.dit.remat != "offload" else 1
        sampled = _layers(model.dit, tokens, layers) / among
        noisy = config.loss.flow_samples if config.loss.flow_samples > 16 else 0
        kept[
            f"loss.flow_samples={noisy}"
            if noisy
            else f"model.image_size={model.image_size} (latents)"
        ] = sampled
    return given, kept


def _layers(network: Any, tokens: int, layers: int) -> float:
    return float(tokens * network.hidden_size * _BYTES[network.dtype] * layers)


def _materializes_scores(config: Config) -> bool:
    """Return whether attention over rows materializes its scores."""
    platform = nn.platform()
    wanted = config.model.ar.attention
    return wanted == "xla" or (wanted == "auto" and platform == "cpu")
