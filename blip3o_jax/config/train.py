"""Settings of training: optimizer, losses, checkpoints."""

import dataclasses
from typing import Annotated, Literal

from blip3o_jax.config.constraints import Bounds
from blip3o_jax.config.fields import ConfigGroup, Keywords
from blip3o_jax.config.types import (
    Decay,
    Dtype,
    Epsilon,
    Fraction,
    NonNegative,
    Part,
    Path,
    PositiveInt,
    Text,
)

MAX_LEARNING_RATE = 100.0
LearningRate = Annotated[float, Bounds(0, MAX_LEARNING_RATE)]


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(ConfigGroup, path="optimizer.schedule"):
    """Set a schedule of optax by name. `kwargs`, {argument: value}, override the arguments that
    follow from `learning_rate`, `end_learning_rate` and `warmup_fraction`.
    """

    name: Text = "warmup_cosine_decay_schedule"
    """Schedule of the learning rate, by the name of its function in optax."""
    kwargs: Keywords = Keywords()
    """Further arguments of the schedule, `{argument: value}`."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(ConfigGroup, path="optimizer"):
    """Set the optimizer: by default a linear warm-up to `learning_rate`, then a cosine to
    `end_learning_rate` at the last step.
    """

    name: Text = "adamw"
    """Optimizer, by its name in optax (`adamw`, `lion`, `adafactor`, `sgd`, ...), or `muon`, which
    trains the matrices of the layer stacks by Muon and the rest by AdamW.
    """
    kwargs: Keywords = Keywords()
    """Further arguments of the optimizer, `{argument: value}`."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Schedule of the learning rate."""
    learning_rate: LearningRate = 5e-5
    """Highest learning rate: that at the end of the warm-up."""
    end_learning_rate: LearningRate = 1e-5
    """Learning rate of the last step."""
    warmup_fraction: Fraction = 0.01
    """Fraction of the steps in which the learning rate rises from 0; one step at least."""
    weight_decay: Annotated[float, Bounds(0, 100)] = 0.0
    """Decoupled weight decay, which is multiplied by the learning rate. Norms and biases have
    none.
    """
    mu_dtype: Dtype | None = None
    """Dtype of the first moment (momentum); `None` takes that of the parameters."""
    b1: Decay = 0.9
    """Decay of AdamW's first moment. Other optimizers have theirs in `kwargs`."""
    b2: Decay = 0.95
    """Decay of AdamW's second moment."""
    eps: Epsilon = 1e-8
    """Term that AdamW and Muon add to the denominator of an update."""
    muon_beta: Decay = 0.95
    """Decay of Muon's momentum."""
    clip_norm: Annotated[float, Bounds(0, 1e6, note="0 switches it off")] = 1.0
    """Largest global norm of the gradient; a larger gradient is scaled down to it."""
    accumulate: Annotated[int, Bounds(1, 2**16)] = 1
    """Micro-batches of a step, whose gradients are averaged: less memory, the same update."""
    ema_decay: Decay = 0.0
    """Decay of the moving average of the trained weights in each step; 0 stores no average."""


@dataclasses.dataclass(frozen=True)
class LossConfig(ConfigGroup, path="loss"):
    """Set the weights of the losses, and the constants of each stage's own loss."""

    ce: NonNegative = 1.0
    """Stage `joint`: weight of the cross entropy of the image tokens and answers."""
    flow: NonNegative = 1.0
    """Stage `joint`: weight of the flow-matching loss of the diffusion head."""
    condition_dropout: Fraction = 0.1
    """Stage `joint`: fraction of the rows whose hidden states are zeroed before the connector, for
    `sampling.guidance`.
    """
    caption_dropout: Fraction = 0.0
    """Stage `joint`: fraction of the rows whose image tokens see no caption, for
    `sampling.token_guidance`. Where it equals `condition_dropout` these are the same rows.
    """
    instruction_dropout: Fraction = 0.0
    """Stage `joint`: fraction of the rows whose hidden states are zeroed while their references
    stay, for `sampling.reference_guidance`.
    """
    flow_samples: Annotated[int, Bounds(1, 1024)] = 1
    """Stage `joint`: noise samples and noise levels for each example, all of which share one
    forward pass of the AR.
    """
    condition_span: Literal["exact", "last"] = "exact"
    """Stage `joint`: hidden states that condition the diffusion head. `exact` takes those of the
    scale token and of the n image tokens, `last` the last n + 1 positions of the row, as the
    released code does.
    """
    ce_chunk: PositiveInt = 512
    """Tokens whose logits are in memory at once in the cross entropy."""
    gradient: NonNegative = 0.4
    """Stage `autoencoder`: weight of the error of the image gradients; that of L1 is 1."""
    squared: NonNegative = 4.0
    """Stage `autoencoder`: weight of the squared error; that of L1 is 1."""
    latent_scale: NonNegative = 0.0
    """Stage `autoencoder`: weight of the term that draws the standard deviation of each channel of
    the scaled latents towards 1, which flow matching expects.
    """
    latent_noise: NonNegative = 0.0
    """Stage `autoencoder`: standard deviation of the noise that is added to the scaled latents, so
    that the decoder tolerates small errors of sampled latents.
    """
    dense: NonNegative = 0.0
    """Stage `contrastive`: weight of the term that predicts the pixels of each patch from its
    feature.
    """
    commitment: NonNegative = 0.25
    """Stage `tokenizer`: weight of the commitment term, which moves vectors to their codes."""
    code_entropy: NonNegative = 0.1
    """Stage `tokenizer`: weight of the entropy term, which keeps all codes in use."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(ConfigGroup, path="checkpoint"):
    """Set when checkpoints are written, and the checkpoints that a run starts from."""

    every: PositiveInt = 1000
    """Steps between two checkpoints. The last step is always saved."""
    keep: PositiveInt = 3
    """Newest checkpoints that stay on disk, in addition to the one of the lowest training loss."""
    init_from: tuple[tuple[Part, Path], ...] = ()
    """Checkpoints that parts start from, as pairs (part, checkpoint directory). Other parts start
    from random weights.
    """
    image_embedding_init: Literal["random", "codes"] = "random"
    """Initial values of the AR's embeddings of the image tokens in stage `joint`. `random` takes
    random values, or those of `init_from`. `codes` takes random projections of the tokenizer's
    codes, also where `init_from` has an AR.
    """
