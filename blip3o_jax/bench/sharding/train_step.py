"""Build the train step as a program that can be compiled from shapes and run on random weights."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from blip3o_jax.bench.sharding.buffers import Logits
from blip3o_jax.config import Config, check
from blip3o_jax.data.sequence import max_labels
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.train.flops import model_flops
from blip3o_jax.train.stages import STAGES, Loss, make_loss
from blip3o_jax.train.state import create_state, plan_state
from blip3o_jax.train.train_step import make_step

Shapes = dict[str, tuple[tuple[int, ...], str]]


class TrainStep:
    """Describe the train step of `config` on the mesh of `strategy`. ConfigError for sizes that do
    not divide over it."""

    within: dict[str, int] = {}  # noqa: RUF012  (bytes among the temporaries that have a name: none)

    def __init__(
        self, config: Config, strategy: Strategy, loss: Callable[[Config, int], Loss] | None = None
    ):
        strategy.check_batch(config.data.batch_size, config.optimizer.accumulate)
        check(
            config.data.pack == 1,
            f"data.pack={config.data.pack}: the bench has rows of one example, which can be full",
        )
        tokens = config.model.tokenizer.num_tokens
        check(
            config.stage != "joint" or config.data.max_length > tokens,
            f"data.max_length={config.data.max_length} must be above {tokens}, the number of tokens"
            " of an image",
        )
        self.config = config
        self.strategy = strategy
        self.rows = config.data.batch_size
        self.plan, self._loss = plan_state(config, strategy), loss or make_loss
        at = strategy.batch_sharding()
        self.batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=at)
            for name, (shape, dtype) in batch_shapes(config).items()
        }

    def lower(self) -> Any:
        loss = self._loss(self.config, 0)
        step: Any = make_step(self.config, self.plan, self.strategy, loss)  # under jax.jit
        return step.lower(self.plan.abstract, self.batch)

    def argument_bytes(self) -> dict[str, int]:
        """Return the bytes of a device for each kind of argument of a step."""
        kinds = {"parameters": "params", "frozen": "frozen", "optimizer": "opt", "averages": "ema"}
        sizes = {kind: shard_bytes(self.plan.abstract[name]) for kind, name in kinds.items()}
        return sizes | {"batch": shard_bytes(self.batch)}

    @property
    def weights(self) -> Any:
        return {name: self.plan.abstract[name] for name in ("params", "frozen")}

    @property
    def logits(self) -> Logits | None:
        """Return the logits that no device should hold; None where one block of the cross entropy
        takes all of them by design."""
        model, length = self.config.model, self.config.data.max_length - 1
        labels = min(max_labels(model.template, model.tokenizer.num_tokens) or length, length)
        if self.config.stage != "joint" or labels <= self.config.loss.ce_chunk:
            return None
        vocabulary, rows = model.ar.padded_vocab_size, self.rows // self.strategy.batch_shards
        columns = self.strategy.sharding("ar", ("act_vocab",), (vocabulary,)).shard_shape(
            (vocabulary,)
        )[0]
        positions = (
            rows
            // self.config.optimizer.accumulate
            * (labels // self.strategy.mesh.shape["sequence"])
        )
        return Logits(positions, columns, vocabulary, model.ar.hidden_size)

    def model_flops(self) -> int:
        return model_flops(self.config, self.strategy, self.batch, self._loss)

    def first_arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the first step: random weights, and a batch whose values do not
        change the time."""
        state = create_state(self.config, self.plan, image_token_offset=0)
        batch = synthetic_batch(self.config)
        return state, {
            name: jax.device_put(x, self.batch[name].sharding) for name, x in batch.items()
        }

    def next_arguments(self, arguments: tuple[Any, ...], result: Any) -> tuple[Any, ...]:
        """Return the arguments of the next step."""
        return result[0], arguments[1]


def batch_shapes(config: Config) -> Shapes:
    """Return {name: (shape, dtype)} of a global batch as the loader makes it (data/examples.py,
    data/sequence.py).
    """
    model = config.model
    rows = config.data.batch_size
    length = config.data.max_length
    fields, size = STAGES[config.stage].fields, model.tokenizer.image_size
    latents = (rows, model.latent_size, model.latent_size, model.vae.latent_channels)
    views: dict[str, Shapes] = {
        "pixels": {"pixels": ((rows, model.image_size, model.image_size, 3), "uint8")},
        "tokenizer_pixels": {"tokenizer_pixels": ((rows, size, size, 3), "uint8")},
        "caption": {"text_ids": ((rows, length), "int32"), "text_mask": ((rows, length), "bool")},
        "row": {name: ((rows, length), "int32") for name in ("tokens", "segment_ids", "positions")}
        | {"loss_mask": ((rows, length), "float32"), "image_span": ((rows,), "int32")},
    }
    if config.stage == "joint" and config.data.cache_dir:
        seen = {
            "codes": ((rows, model.tokenizer.num_tokens), "int32"),
            "latents": (latents, "float32"),
        }
    else:
        seen = {
            name: value
            for field in fields
            if field in ("pixels", "tokenizer_pixels")
            for name, value in views[field].items()
        }
    shapes = seen | {
        name: value
        for field in fields
        if field in ("caption", "row")
        for name, value in views[field].items()
    }
    if config.stage == "joint" and (slots := model.editing.reference_slots):
        shapes |= {
            f"reference_{name}": ((rows, slots, *shape[1:]), dtype)
            for name, (shape, dtype) in seen.items()
        }
        shapes |= {
            "reference_span": ((rows, slots), "int32"),
            "reference_mask": ((rows, slots), "float32"),
        }
        shapes |= {"target": ((rows,), "float32")}
    return shapes | {"bad_records": ((rows,), "int32")}


def synthetic_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a random batch of those shapes: full rows with a reference image in every slot, and
    with the image to learn last."""
    rng = np.random.default_rng(seed)
    model = config.model
    length = config.data.max_length
    first = max(0, length - model.tokenizer.num_tokens - 1)  # the scale token's place
    id_limits = {
        "tokens": model.ar.vocab_size,
        "text_ids": model.ar.vocab_size,
        "codes": model.tokenizer.codebook_size,
    }
    id_limits["reference_codes"] = id_limits["codes"]
    index_L = np.arange(length)
    known = {
        "segment_ids": 1,
        "positions": index_L,
        "loss_mask": index_L > first,
        "image_span": first,
        "text_mask": True,
        "bad_records": 0,
        "target": 1,
        "reference_mask": 1,
        "reference_span": np.arange(model.editing.reference_slots)
        * (model.tokenizer.num_tokens + 2),
    }

    def array(name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        if name in known:
            return np.broadcast_to(np.asarray(known[name]), shape).astype(dtype)
        if dtype == "float32":
            return rng.standard_normal(shape, np.float32)
        return rng.integers(0, id_limits.get(name, 256), shape, dtype)

    return {name: array(name, *value) for name, value in batch_shapes(config).items()}


def shard_bytes(tree: Any) -> int:
    """Return the bytes of one device, of arrays or ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
