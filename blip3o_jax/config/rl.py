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
    """Set one term of the weighted sum of rewards. `name`: one of rl/rewards/ or
    "python:MODULE.FUNCTION"; `options`: the reward's own, {option: value}; `clip`: bounds that its
    score is clipped to before it is weighted.
    """

    name: Text = ""
    weight: Annotated[Finite, NonZero()] = 1.0
    clip: Annotated[tuple[Finite, Finite], Increasing()] | None = None
    options: tuple[tuple[Text, Path], ...] = ()


@dataclasses.dataclass(frozen=True)
class FlowPolicyConfig(ConfigGroup, path="rl.flow"):
    """Set Flow-GRPO (arXiv 2505.05470): the sampler of the diffusion head as a policy."""

    steps: Annotated[int, Bounds(2, 10_000)] = 10  # of the stochastic sampler in a rollout
    # Of these, chosen at random for each rollout, carry noise and are trained on.
    trained_steps: PositiveInt = 4
    # The stochastic sampler's a; 0 would be the Euler sampler, which has no probabilities.
    noise_level: Annotated[float, Bounds(1e-6, 100)] = 0.7
    # Of the ratio, on both sides: a step's log-probability is a mean over the latents.
    clip: Positive = 1e-3
    # Weight of the KL divergence to the policy that the run starts from.
    kl_coef: NonNegative = 0.01

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

    # "ar": GRPO on the image tokens; "flow": Flow-GRPO on the diffusion head; "both"; or another of
    # rl/registry.py.
    policy: Text = "ar"
    # JSON lines {"prompt" or "caption": ..., and what the rewards read}, or plain text, one a
    # line.
    prompts_file: Path = ""
    num_prompts: Annotated[int, Bounds(1, 2**20)] = 8  # prompts of a rollout
    # Images of each prompt: a group, whose rewards are compared with each other.
    num_generations: Annotated[
        int, Bounds(2, 2**14, note="an image is compared with others of its prompt")
    ] = 16
    # How image tokens and latents are sampled in a rollout; `rollout.batch_size` images at once.
    rollout: SamplingConfig = SamplingConfig(top_k=0, top_p=1.0)
    num_iterations: Annotated[int, Bounds(1, 1024)] = 1  # optimizer steps on a rollout
    # Whether an advantage, the reward less its group's mean, is divided by the standard deviation
    # of the group ("group") or not ("none", as in Dr. GRPO).
    scale_rewards: Literal["group", "none"] = "group"
    advantage_epsilon: Epsilon = 1e-4
    # Sum of the token losses over: all tokens ("bnpo"), each row's own and then rows ("grpo"), a
    # constant ("dr_grpo").
    loss_aggregation: Literal["bnpo", "grpo", "dr_grpo"] = "bnpo"
    # Or "sequence": one ratio an image, the geometric mean over its tokens (GSPO).
    importance_sampling_level: Literal["token", "sequence"] = "token"
    # Of the ratio, downwards and upwards; DAPO clips higher upwards.
    clip: tuple[ClipDown, Positive] = (0.2, 0.2)
    # Weight of the KL divergence to the policy that the run starts from; 0 keeps no second
    # policy.
    kl_coef: NonNegative = 0.001
    # DAPO: the most further rollouts that are sampled to replace groups whose rewards are all
    # equal; 0 turns it off.
    dynamic_sampling: Annotated[int, Bounds(0, 1024)] = 0
    logits_chunk: PositiveInt = 128  # image tokens a row whose logits are held at once
    # Largest |ratio - 1| before the first update above which the run stops; 0 only warns.
    max_ratio_gap: NonNegative = 0.0
    rewards: tuple[RewardConfig, ...] = ()
    # Reward processes of each host; 0: as many as it has cores.
    workers: Annotated[int, Bounds(0, 1024)] = 0
    timeout: Seconds = 60.0  # seconds that a worker may take for one image
    retries: Annotated[int, Bounds(0, 1000)] = 1  # of an image whose reward failed
    # Fraction of a rollout's images without a reward above which the run stops.
    max_failed_fraction: Fraction = 0.1
    # By how many rollouts the policy that samples is behind the one that trains: with 1 the devices
    # sample a rollout while the rewards of the one before are computed.
    off_policy_steps: Annotated[int, Bounds(0, 1)] = 0
    samples_every: PositiveInt = 10  # rollouts between two pictures of the best and worst samples
    keep_images: bool = (
        False  # every image as a PNG file under the workdir, for `blip3o rl rescore`
    )
    flow: FlowPolicyConfig = FlowPolicyConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not (self.dynamic_sampling and self.off_policy_steps),
            "rl.dynamic_sampling needs the rewards before the next rollout is sampled, "
            "rl.off_policy_steps only after: set one of them to 0",
        )
