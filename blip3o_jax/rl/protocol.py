"""Define the interface of a policy: a distribution that a rollout samples from, with its loss.

`token_policy.py` and `flow_policy.py` implement `Policy`, and the table of `registry.py` maps the
setting `rl.policy` to those that a run trains. Rollout, reference, loss and ratio monitor go
through the policies of a run in the order of the table, and none of these names one.
"""

import abc
from typing import Any, ClassVar, Literal, NamedTuple

import jax

from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config

RolloutArrays = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# Mean of |ratio - 1| that rounding explains, by dtype (monitor.py).
ROUNDING = {"float32": 1e-5, "bfloat16": 0.03}


class RolloutPrompts(NamedTuple):
    """Hold the prompts of a rollout, inside its program.

    Each of the R rows is the prompt of `prefix_group` consecutive images, which share its prefill:
    B = R prefix_group.
    """

    tokens_RL: jax.Array  # int32, padded on the right
    lengths_R: jax.Array  # int32
    token_keys_B: jax.Array  # PRNG key of each image's tokens
    noise_keys_B: jax.Array  # PRNG key of each image's noise
    seed: jax.Array
    number: jax.Array  # of the rollout in the run
    image_ids: tuple[int, int]  # first id of the codebook, last + 1
    prefix_group: int


class LossWeights(NamedTuple):
    """Hold the weights of the images of a (micro-)batch in a loss."""

    advantage_B: jax.Array
    valid_B: jax.Array  # bool: has a reward
    valid_fraction_B: jax.Array  # of the whole batch, the same for each image


class Policy(abc.ABC):
    """Define one policy of a run.

    `samples`: what it samples in a rollout. "tokens": `sample(model, prompts)` returns the hidden
    states that condition the diffusion head [B, N + 1, D]; "latents": `sample(model, prompts,
    hidden_BTD)` returns the latents [B, H, W, C]. Both also return the arrays that `reference`
    and `loss` read, each with the axis B first.
    """

    samples: ClassVar[Literal["tokens", "latents"]]
    parts: ClassVar[frozenset[str]]  # of the model, that the loss has a gradient for
    trainable: ClassVar[tuple[str, ...]]  # default patterns of trained parameters
    # Prefix of the metrics of `loss`. The monitor checks `ratio_gap` if it is among them.
    metric_prefix: ClassVar[str]

    def __init__(self, config: Config):
        """Raise ConfigError where the settings leave the policy nothing to learn from."""
        self.rl = config.rl
        self.model = config.model

    @property
    @abc.abstractmethod
    def has_reference(self) -> bool:
        """Return whether the loss needs the reference policy."""

    @property
    @abc.abstractmethod
    def rounding(self) -> float:
        """Return the mean of |ratio - 1| before the first update that rounding explains."""

    @abc.abstractmethod
    def sample(self, model: Blip3o, prompts: RolloutPrompts, *more: Any) -> tuple[Any, Any]:
        """Return (what the policy samples, arrays); see the class."""

    @abc.abstractmethod
    def reference(
        self, model: Blip3o, arrays: RolloutArrays, image_ids: tuple[int, int], prefix_group: int
    ) -> RolloutArrays:
        """Return the arrays that the loss reads; `model` has the reference policy's weights."""

    @abc.abstractmethod
    def loss(
        self,
        model: Blip3o,
        arrays: RolloutArrays,
        weights: LossWeights,
        image_ids: tuple[int, int],
        prefix_group: int,
    ) -> tuple[jax.Array, Metrics]:
        """Return the loss and metrics of a (micro-)batch, scalars."""


def rounding_of(dtype: str) -> float:
    """Return the mean of |ratio - 1| that rounding explains in a compute dtype."""
    return ROUNDING.get(dtype, ROUNDING["bfloat16"])
