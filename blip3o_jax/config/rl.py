"""Settings of online reinforcement learning."""

import dataclasses
from typing import Annotated, Literal

from blip3o_jax.config.constraints import Bounds, Increasing, NonZero
from blip3o_jax.config.errors import check
from blip3o_jax.config.fields import ConfigGroup
from blip3o_jax.config.sampling import SamplingConfig
from blip3o_jax.config.types import (
    Epsilon,
    Finite,
    Fraction,
    NonNegative,
    Path,
    Positive,
    PositiveInt,
    Text,
)

ClipDown = Annotated[float, Bounds(1e-6, 1, open_high=True)]
Seconds = Annotated[float, Bounds(1e-3, 1e7)]


@dataclasses.dataclass(frozen=True)
class RewardConfig(ConfigGroup, path="rl.rewards"):
    """Set one term of the weighted sum of rewards."""

    name: Text = ""
    """Reward: `geneval`, `ocr`, `clip`, `http` or another of rl/rewards/registry.py, or
    `python:MODULE.FUNCTION`.
    """
    weight: Annotated[Finite, NonZero()] = 1.0
    """Factor of the score in the sum. A negative one makes a penalty of it."""
    clip: Annotated[tuple[Finite, Finite], Increasing()] | None = None
    """Bounds that the score is clipped to before it is weighted; `None` does not clip."""
    options: tuple[tuple[Text, Path], ...] = ()
    """Options of the reward, as pairs (option, value)."""


@dataclasses.dataclass(frozen=True)
class FlowPolicyConfig(ConfigGroup, path="rl.flow"):
    """Set Flow-GRPO (arXiv 2505.05470): the sampler of the diffusion head as a policy."""

    steps: Annotated[int, Bounds(2, 10_000)] = 10
    """Denoising steps of an image in a rollout."""
    trained_steps: PositiveInt = 4
    """Denoising steps, chosen at random for each rollout, that have noise and are trained on."""
    noise_level: Annotated[float, Bounds(1e-6, 100)] = 0.7
    """Noise a of the stochastic sampler. 0 would be the Euler sampler, which has no
    probabilities.
    """
    clip: Positive = 1e-3
    """Clip of the ratio on both sides. It is small because the log-probability of a step is a mean
    over the numbers of a latent.
    """
    kl_coef: NonNegative = 0.01
    """Weight of the KL divergence to the policy that the run starts from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.trained_steps < self.steps,
            f"rl.flow.trained_steps={self.trained_steps} must lie between 1 and {self.steps - 1}: "
            "the last of rl.flow.steps has no noise",
        )


@dataclasses.dataclass(frozen=True)
class RlConfig(ConfigGroup, path="rl"):
    """Set online reinforcement learning (`blip3o rl`) from the checkpoint of
    `checkpoint.init_from`. Defaults are the published recipe's (arXiv 2510.15857).
    """

    policy: Text = "ar"
    """Policy that is trained: `ar`, the image tokens by GRPO; `flow`, the diffusion head by
    Flow-GRPO; `both`; or another policy of rl/registry.py.
    """
    prompts_file: Path = ""
    """File of the prompts: JSON lines of objects with `prompt` or `caption` and the fields that the
    rewards read, or plain text with one prompt a line.
    """
    num_prompts: Annotated[int, Bounds(1, 2**20)] = 8
    """Prompts of a rollout."""
    num_generations: Annotated[
        int, Bounds(2, 2**14, note="an image is compared with others of its prompt")
    ] = 16
    """Images of each prompt: a group, whose rewards are compared with each other."""
    rollout: SamplingConfig = SamplingConfig(top_k=0, top_p=1.0)
    """How image tokens and latents are sampled in a rollout, at most `rollout.batch_size` images at
    once.
    """
    num_iterations: Annotated[int, Bounds(1, 1024)] = 1
    """Optimizer steps on each rollout."""
    scale_rewards: Literal["group", "none"] = "group"
    """`group` divides an advantage, the reward minus its group's mean, by the group's standard
    deviation; `none` does not, as in Dr. GRPO.
    """
    advantage_epsilon: Epsilon = 1e-4
    """Term that is added to the standard deviation that divides an advantage."""
    loss_aggregation: Literal["bnpo", "grpo", "dr_grpo"] = "bnpo"
    """How the losses of the tokens are averaged: `bnpo` over all tokens of images with a reward,
    `grpo` over each image's tokens and then over these images, `dr_grpo` over all images of the
    batch, with or without a reward.
    """
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """`token` has a ratio for each token; `sequence` has one for each image, the geometric mean
    over its tokens (GSPO).
    """
    clip: tuple[ClipDown, Positive] = (0.2, 0.2)
    """Clip of the ratio, downwards and upwards. DAPO has a larger one upwards."""
    kl_coef: NonNegative = 0.001
    """Weight of the KL divergence to the policy that the run starts from; 0 does without a
    reference policy and its memory.
    """
    dynamic_sampling: Annotated[int, Bounds(0, 1024)] = 0
    """Rollouts that are sampled at most to replace groups whose rewards are all equal (DAPO); 0
    replaces none.
    """
    logits_chunk: PositiveInt = 128
    """Image tokens of a row whose logits are in memory at once."""
    max_ratio_gap: NonNegative = 0.0
    """Largest |ratio - 1| before the first update on a rollout above which the run stops; 0 only
    warns.
    """
    rewards: tuple[RewardConfig, ...] = ()
    """Terms of the reward, which are summed by their weights."""
    workers: Annotated[int, Bounds(0, 1024)] = 0
    """Reward processes of each host; 0 has one for each core."""
    timeout: Seconds = 60.0
    """Seconds that a reward process may take for an image before it is ended."""
    retries: Annotated[int, Bounds(0, 1000)] = 1
    """Further attempts for an image whose reward failed."""
    max_failed_fraction: Fraction = 0.1
    """Fraction of a rollout's images without a reward above which the run stops."""
    off_policy_steps: Annotated[int, Bounds(0, 1)] = 0
    """Rollouts by which the policy that samples is behind the one that is trained. With 1 the
    devices sample a rollout while the rewards of the one before are computed.
    """
    samples_every: PositiveInt = 10
    """Rollouts between two pictures of the best and worst images in TensorBoard."""
    keep_images: bool = False
    """Store every image as a PNG file in the workdir, for `blip3o rl rescore`."""
    flow: FlowPolicyConfig = FlowPolicyConfig()
    """Flow-GRPO on the diffusion head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not (self.dynamic_sampling and self.off_policy_steps),
            "rl.dynamic_sampling needs the rewards before the next rollout is sampled, "
            "rl.off_policy_steps only after: set one of them to 0",
        )
