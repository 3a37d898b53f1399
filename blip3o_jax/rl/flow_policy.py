"""Define the sampler of the diffusion head as a policy over denoising steps: Flow-GRPO
(flow_grpo.py).

Arrays: hidden [B, N + 1, D], the condition before the connector; latents, next_latents [B, K, H, W,
C] before and after the steps trained on; step [B, K], which steps these are; flow_logprobs [B, K];
with a reference reference_mean [B, K, H, W, C].

The denoising steps are conditioned on the hidden states of the rollout; no gradient goes from them
into the AR.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from blip3o_jax import nn
from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import SamplingConfig
from blip3o_jax.dit import sampler
from blip3o_jax.dit.guidance import guided_velocity
from blip3o_jax.rl import flow_grpo
from blip3o_jax.rl.protocol import (
    LossWeights,
    Metrics,
    Policy,
    RolloutArrays,
    RolloutPrompts,
    rounding_of,
)
from blip3o_jax.sampling_programs import prepare_latents


class FlowPolicy(Policy):
    """Implement `Policy` for the denoising steps."""

    samples = "latents"
    parts = frozenset({"connector", "dit"})
    trainable = ("dit/.*",)
    metric_prefix = "rl/flow/"

    @property
    def has_reference(self) -> bool:
        return bool(self.rl.flow.kl_coef)

    @property
    def rounding(self) -> float:
        return min(rounding_of(self.model.dit.dtype), self.rl.flow.clip)

    def sample(
        self, model: Blip3o, prompts: RolloutPrompts, hidden_BTD: jax.Array
    ) -> tuple[jax.Array, RolloutArrays]:
        cfg = self.rl.flow
        noise_BHWC = prepare_latents(model.cfg, prompts.noise_keys_B)
        velocity = guided_velocity_fn(model, hidden_BTD, self.rl.rollout)
        with nn.part("dit"):
            # 2^32 - 1 is no index of an image: the key differs from those of all images.
            steps_key = jax.random.fold_in(
                jax.random.fold_in(jax.random.key(prompts.seed), 2**32 - 1), prompts.number
            )
            steps_K = flow_grpo.choose_steps(steps_key, cfg.steps, cfg.trained_steps)
            z_BHWC, path = flow_grpo.sample_sde(
                velocity,
                noise_BHWC,
                prompts.noise_keys_B,
                steps_K,
                steps=cfg.steps,
                noise=cfg.noise_level,
                flow=model.cfg.flow,
            )
        return z_BHWC, {
            "hidden": hidden_BTD,
            "latents": path.x_BKHWC,
            "next_latents": path.next_BKHWC,
            "step": jnp.broadcast_to(path.step_K, path.logprob_BK.shape),
            "flow_logprobs": path.logprob_BK,
        }

    def means(self, model: Blip3o, arrays: RolloutArrays) -> tuple[jax.Array, jax.Array]:
        """Return the means [B, K, H, W, C] and deviations [B, K] of the denoising steps."""
        flow = model.cfg.flow
        cfg = self.rl.flow
        velocity = guided_velocity_fn(model, arrays["hidden"], self.rl.rollout)
        sigma_BK, next_BK = flow_grpo.step_sigmas(arrays["step"], steps=cfg.steps, flow=flow)

        def one(_: None, inputs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
            x_BHWC, sigma_B, next_B = inputs
            with nn.part("dit"):
                v_BHWC = velocity(x_BHWC, sigma_B * flow.num_train_timesteps)
            return None, flow_grpo.transition(
                x_BHWC, v_BHWC, sigma_B, next_B, noise=cfg.noise_level
            )

        # Scan slices the leading axis.
        steps_first = jax.tree.map(
            lambda x: x.swapaxes(0, 1), (arrays["latents"], sigma_BK, next_BK)
        )
        # One trained step at a time: all K together would hold K times the DiT's activations.
        _, found = jax.lax.scan(jax.checkpoint(one), None, steps_first)
        return jax.tree.map(lambda x: x.swapaxes(0, 1), found)

    def reference(
        self, model: Blip3o, arrays: RolloutArrays, image_ids: tuple[int, int], prefix_group: int
    ) -> RolloutArrays:
        del image_ids, prefix_group
        return {"reference_mean": self.means(model, arrays)[0]}

    def loss(
        self,
        model: Blip3o,
        arrays: RolloutArrays,
        weights: LossWeights,
        image_ids: tuple[int, int],
        prefix_group: int,
    ) -> tuple[jax.Array, Metrics]:
        del image_ids, prefix_group
        mean_BKHWC, std_BK = self.means(model, arrays)
        log_prob = jax.vmap(flow_grpo.log_prob, in_axes=1, out_axes=1)
        logprob_BK = log_prob(arrays["next_latents"], mean_BKHWC, std_BK)
        kl_BK = None
        if "reference_mean" in arrays:
            kl_BK = jax.vmap(flow_grpo.kl, in_axes=1, out_axes=1)(
                mean_BKHWC, arrays["reference_mean"], std_BK
            )
        return flow_grpo.policy_loss(
            logprob_BK, arrays["flow_logprobs"], kl_BK, *weights, cfg=self.rl.flow
        )


def sample_ode_latents(
    model: Blip3o, prompts: RolloutPrompts, hidden_BTD: jax.Array, settings: SamplingConfig
) -> tuple[jax.Array, RolloutArrays]:
    """Sample like `FlowPolicy.sample`, by Euler steps, for runs that do not train the latents."""
    noise_BHWC = prepare_latents(model.cfg, prompts.noise_keys_B)
    velocity = guided_velocity_fn(model, hidden_BTD, settings)
    with nn.part("dit"):
        z_BHWC = sampler.euler(velocity, noise_BHWC, steps=settings.steps, flow=model.cfg.flow)
    return z_BHWC, {}


def guided_velocity_fn(
    model: Blip3o, hidden_BTD: jax.Array, settings: SamplingConfig
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return (latents, timesteps) -> the velocity under classifier-free guidance."""
    guidance = model.guidance(hidden_BTD, settings)
    with nn.part("dit"):
        return guided_velocity(model.dit, guidance)
