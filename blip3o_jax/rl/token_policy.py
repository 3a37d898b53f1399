"""Define the AR as a policy over image tokens: GRPO and its variants (grpo.py).

Arrays: image_ids, logprobs [B, N]; support [B, N, X] where top-k or top-p is on; with a reference
reference_logprobs [B, N].
"""

import jax
import jax.numpy as jnp

from blip3o_jax import nn
from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config, SamplingConfig, check
from blip3o_jax.rl import grpo
from blip3o_jax.rl.log_probs import TokenScores, score_image_tokens
from blip3o_jax.rl.protocol import (
    LossWeights,
    Metrics,
    Policy,
    RolloutArrays,
    RolloutPrompts,
    rounding_of,
)
from blip3o_jax.sampling_programs import sample_image_tokens


class TokenPolicy(Policy):
    """Implement `Policy` for the image tokens."""

    samples = "tokens"
    parts = frozenset({"ar"})
    trainable = ("ar/.*",)
    metric_prefix = "rl/"

    def __init__(self, config: Config):
        super().__init__(config)
        check(
            self.rl.rollout.temperature > 0,
            f"rl.rollout.temperature=0 leaves rl.policy={self.rl.policy} nothing to compare: "
            "tokens of a group must differ",
        )

    @property
    def has_reference(self) -> bool:
        return bool(self.rl.kl_coef)

    @property
    def rounding(self) -> float:
        return rounding_of(self.model.ar.dtype)

    def sample(self, model: Blip3o, prompts: RolloutPrompts) -> tuple[jax.Array, RolloutArrays]:
        sampled = sample_image_tokens(
            model,
            prompts.tokens_RL,
            prompts.lengths_R,
            prompts.token_keys_B,
            self.rl.rollout,
            prompts.image_ids,
            group=prompts.prefix_group,
            # Scores are under the truncated distribution, which its support defines.
            return_support=True,
        )
        arrays = {"image_ids": sampled.ids_BN, "logprobs": sampled.logprobs_BN}
        if sampled.support_BNX is not None:
            arrays["support"] = sampled.support_BNX
        return sampled.hidden_BTD, arrays

    def score(
        self, model: Blip3o, arrays: RolloutArrays, image_ids: tuple[int, int], prefix_group: int
    ) -> TokenScores:
        """Return the scores of the image tokens; `prefix_group` rows share one prefill."""
        with nn.part("ar"):
            return score_image_tokens(
                model.ar,
                arrays["tokens"],
                arrays["lengths"],
                arrays["image_ids"],
                arrays.get("support"),
                self.rl.rollout,
                image_ids=image_ids,
                chunk=self.rl.logits_chunk,
                group=prefix_group,
            )

    def reference(
        self, model: Blip3o, arrays: RolloutArrays, image_ids: tuple[int, int], prefix_group: int
    ) -> RolloutArrays:
        return {
            "reference_logprobs": self.score(model, arrays, image_ids, prefix_group).logprobs_BN
        }

    def loss(
        self,
        model: Blip3o,
        arrays: RolloutArrays,
        weights: LossWeights,
        image_ids: tuple[int, int],
        prefix_group: int,
    ) -> tuple[jax.Array, Metrics]:
        scores = self.score(model, arrays, image_ids, prefix_group)
        value, metrics = grpo.policy_loss(
            scores.logprobs_BN,
            arrays["logprobs"],
            arrays.get("reference_logprobs"),
            *weights,
            cfg=self.rl,
        )
        metrics["entropy"] = grpo.masked_mean(
            jax.lax.stop_gradient(scores.entropy_BN), *weights[1:]
        )
        return value, metrics


def sample_shared_tokens(
    model: Blip3o, prompts: RolloutPrompts, group: int, settings: SamplingConfig
) -> tuple[jax.Array, RolloutArrays]:
    """Sample like `TokenPolicy.sample`, for runs that do not train the tokens.

    All images of a group have the same image tokens, so that their rewards differ only by the
    samples that are trained.
    """
    sampled = sample_image_tokens(
        model,
        prompts.tokens_RL,
        prompts.lengths_R,
        # The key of each group's first image, for every row of its prompt.
        jnp.repeat(prompts.token_keys_B[::group], group // prompts.prefix_group, axis=0),
        settings,
        prompts.image_ids,
    )
    return jnp.repeat(sampled.hidden_BTD, prompts.prefix_group, axis=0), {}
