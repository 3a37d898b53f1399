"""Build a rollout, text to image for a batch of prompts, as a program that can be compiled from
shapes and run on random weights.

It is the program of sampling_programs.py: one prefill of the prompts, a loop over the image tokens,
the denoising steps with guidance, the autoencoder's decoder. Weights are stored in the dtype in
which each part computes, as in a rollout that trains nothing.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip3o_jax.bench.sharding.train_step import shard_bytes
from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config, ConfigError, ModelConfig
from blip3o_jax.data.sequence import padded_length
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.sampling_programs import make_image_sampler
from blip3o_jax.train.flops import count_flops

SAMPLING_PARTS = ("ar", "connector", "dit", "vae")
PROMPT = 128  # tokens; of 32 or more, since prompts are padded to a multiple of that


class Rollout:
    """Describe a rollout of `config.sampling.batch_size` prompts on the mesh of `strategy`.
    ConfigError for sizes that do not divide over it."""

    logits = None  # of one position a row at a time

    def __init__(self, config: Config, strategy: Strategy, loss: None = None):
        self.config = config
        self.strategy = strategy
        self.rows = config.sampling.batch_size
        if self.rows % strategy.batch_shards:
            raise ConfigError(
                f"sampling.batch_size={self.rows} does not divide over {strategy.batch_shards} "
                "batch shards: use a multiple"
            )
        self.model, self.length = in_compute_dtype(config.model), prompt_length(config)
        self._graphdef, weights = nnx.split(nnx.eval_shape(self._build))
        self._shardings = strategy.parameter_shardings(weights)
        self.weights = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
            nnx.to_pure_dict(weights),
            self._shardings,
        )
        # The last ids in use: which they are makes no difference.
        last = config.model.ar.vocab_size - config.model.ar.spare_rows
        image_ids = last - config.model.tokenizer.codebook_size, last
        self._sample: Any = make_image_sampler(self._graphdef, strategy, image_ids)

    def _build(self) -> Blip3o:
        return Blip3o(self.model, SAMPLING_PARTS, seed=self.config.seed)

    @property
    def branches(self) -> int:
        """Return the rows of the AR for a prompt."""
        return 1 if self.config.sampling.token_guidance == 1.0 else 2

    @property
    def slots(self) -> int:
        """Return the slots of the KV cache."""
        return self.length + self.model.tokenizer.num_tokens

    def lower(self) -> Any:
        prompts = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self._prompts())
        return self._sample.lower(self.weights, *prompts, self.config.sampling)

    def argument_bytes(self) -> dict[str, int]:
        """Return the bytes of a device for each kind of argument of a rollout."""
        return {"weights": shard_bytes(self.weights)}

    @property
    def within(self) -> dict[str, int]:
        """Return the bytes of a device of named temporaries of the program: the cache's keys and
        values."""
        ar = self.model.ar
        shape = (self.rows * self.branches, ar.num_key_value_heads, self.slots, ar.head_dim)
        at = self.strategy.sharding("ar", ("batch", "act_kv_heads", None, None), shape)
        return {
            "cache": 2
            * ar.num_hidden_layers
            * math.prod(at.shard_shape(shape))
            * jnp.dtype(ar.dtype).itemsize
        }

    def model_flops(self) -> int:
        """Return the FLOPs of a rollout, each result computed once; attention counts the positions
        that each token attends to, while the program multiplies every slot of the cache, also the
        empty ones."""
        sample = functools.partial(self._sample, settings=self.config.sampling)
        counted = count_flops(sample, self.weights, *self._prompts())
        ar = self.model.ar
        unseen = self.slots * (self.slots - 1) // 2  # pairs of a token and one after it
        pairs = self.rows * self.branches * unseen
        return counted - 4 * pairs * ar.num_attention_heads * ar.head_dim * ar.num_hidden_layers

    def first_arguments(self) -> tuple[Any, ...]:
        """Return random weights and prompts: their values do not change the time."""
        draw = jax.jit(
            lambda: nnx.to_pure_dict(nnx.split(self._build())[1]), out_shardings=self._shardings
        )
        return draw(), *self._prompts()

    def next_arguments(self, arguments: tuple[Any, ...], result: Any) -> tuple[Any, ...]:
        return arguments

    def _prompts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.uint32]:
        """Return tokens, lengths, indices and seed: NumPy arrays, as the pipeline passes them."""
        tokens_BL = np.random.default_rng(0).integers(
            0, self.model.ar.vocab_size, (self.rows, self.length), np.int32
        )
        lengths_B = np.full(self.rows, self.length, np.int32)
        return tokens_BL, lengths_B, np.arange(self.rows, dtype=np.uint32), np.uint32(0)


def prompt_length(config: Config) -> int:
    """Return PROMPT, or the length of a row without the image; a multiple of the prompts'
    padding."""
    room = max(1, config.data.max_length - config.model.tokenizer.num_tokens)
    return padded_length(min(PROMPT, room))


def in_compute_dtype(model: ModelConfig) -> ModelConfig:
    """Return the model with weights in the dtype in which each part of a rollout computes: bfloat16
    in the published sizes."""
    parts = {name: getattr(model, name) for name in SAMPLING_PARTS}
    return dataclasses.replace(
        model, **{name: dataclasses.replace(c, param_dtype=c.dtype) for name, c in parts.items()}
    )
