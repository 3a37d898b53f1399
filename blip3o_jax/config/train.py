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
    kwargs: Keywords = Keywords()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(ConfigGroup, path="optimizer"):
    """Set the optimizer: by default a linear warm-up to `learning_rate`, then a cosine to
    `end_learning_rate` at the last step.
    """

    # Any optimizer of optax ("lion", "adafactor", "sgd", ...), or "muon": the matrices of the layer
    # stacks by Muon, the rest by AdamW (train/optimizer.py).
    name: Text = "adamw"
    # Further arguments of the optimizer, {argument: value}.
    kwargs: Keywords = Keywords()
    schedule: ScheduleConfig = ScheduleConfig()
    learning_rate: LearningRate = 5e-5
    end_learning_rate: LearningRate = 1e-5
    warmup_fraction: Fraction = 0.01
    # Norms and biases are not decayed.
    weight_decay: Annotated[float, Bounds(0, 100)] = 0.0
    # Of the first moment (momentum); None: the parameters'.
    mu_dtype: Dtype | None = None
    # b1, b2, eps: of AdamW; muon_beta: of Muon. Other optimizers have them in `kwargs`.
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: Epsilon = 1e-8
    muon_beta: Decay = 0.95
    clip_norm: Annotated[float, Bounds(0, 1e6, note="0 switches it off")] = 1.0
    accumulate: Annotated[int, Bounds(1, 2**16)] = 1  # micro-batches per step
    ema_decay: Decay = 0.0  # 0 keeps no averaged weights


@dataclasses.dataclass(frozen=True)
class LossConfig(ConfigGroup, path="loss"):
    """Set the weights of the losses, and the constants of each stage's own loss."""

    ce: NonNegative = 1.0
    flow: NonNegative = 1.0
    # Fraction of rows whose hidden states are zeroed before the connector.
    condition_dropout: Fraction = 0.1
    # Fraction of rows whose image tokens see no caption, for `sampling.token_guidance`. Where it
    # equals condition_dropout these are the same rows.
    caption_dropout: Fraction = 0.0
    # Fraction of rows whose hidden states are zeroed while their references stay, for
    # `sampling.reference_guidance`.
    instruction_dropout: Fraction = 0.0
    # Noises and noise levels drawn for each example: more of them for one pass of the AR.
    flow_samples: Annotated[int, Bounds(1, 1024)] = 1
    # "exact" takes the hidden states of <S0>, I_1 .. I_n; "last" the reference's last n + 1
    # positions of the row.
    condition_span: Literal["exact", "last"] = "exact"
    ce_chunk: PositiveInt = 512  # tokens per block of the cross entropy
    gradient: NonNegative = 0.4  # autoencoder: weight of the image-gradient term, L1 having 1
    squared: NonNegative = 4.0  # autoencoder: weight of the squared error, L1 having 1
    # autoencoder: weight of the term that holds each channel of the scaled latents at unit
    # variance, which flow matching expects, and deviation of the noise put on them, which makes the
    # decoder forgive what sampling gets slightly wrong.
    latent_scale: NonNegative = 0.0
    latent_noise: NonNegative = 0.0
    dense: NonNegative = 0.0  # contrastive: weight of reading each patch's pixels off its feature
    commitment: NonNegative = 0.25  # tokenizer: weight of the commitment term
    # Tokenizer: weight of the usage-entropy term that keeps codes alive.
    code_entropy: NonNegative = 0.1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(ConfigGroup, path="checkpoint"):
    """Set when checkpoints are written, and the checkpoints that a run starts from."""

    every: PositiveInt = 1000
    keep: PositiveInt = 3
    # Parts to start from: {part: checkpoint directory}, part one of the model's
    # (blip3o.MODEL_PARTS).
    init_from: tuple[tuple[Part, Path], ...] = ()
    # Initial values of the AR's embeddings of the image tokens: "random" (or as init_from has
    # them), or projections of the tokenizer's "codes", which also replace those of an AR from
    # init_from (joint stage).
    image_embedding_init: Literal["random", "codes"] = "random"
