"""Define the training stages: the parts, the loss and the trainable parameters of each.

The training loop is the same for all stages.

    autoencoder   pixels -> vae -> pixels                        L1 + image gradients
    contrastive   (pixels, caption) -> encoder, text tower       SigLIP's sigmoid loss, optionally
                                                                 with pixels from the features
    tokenizer     pixels -> frozen encoder -> codes -> features  reconstruction + commitment + code
                                                                 usage
    joint         row + image -> AR, connector, DiT              cross entropy + flow matching
"""

import dataclasses
import functools
from collections.abc import Callable

import jax

from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config
from blip3o_jax.train.joint_loss import (
    joint_loss,
    joint_normalizers,
    joint_preview,
    joint_totals,
)
from blip3o_jax.train.stage_losses import (
    autoencoder_loss,
    autoencoder_preview,
    contrastive_loss,
    tokenizer_loss,
)

Batch = dict[str, jax.Array]  # global arrays, whose first axis is the batch
# (model, batch, one key a row) -> (loss, metrics), both means over the rows given.
LossFunction = Callable[[Blip3o, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

# The same with the settings `loss` (LossConfig) and `image_token_offset` by name.
StageLoss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
StagePreview = Callable[..., jax.Array]


def no_normalizers(batch: Batch, examples: int) -> dict[str, jax.Array]:
    """Return no divisors: the loss is a mean over the examples."""
    del batch, examples
    return {}


def no_totals(batch: Batch) -> dict[str, jax.Array]:
    """Return no totals: the loop itself counts steps and examples."""
    del batch
    return {}


@dataclasses.dataclass(frozen=True)
class Loss:
    """Define the loss of a train step, and the sums that the step counts over the whole batch.

    `normalizers`: (batch, number of examples) -> {name: scalar}, the divisors of the function, as
    means over the examples. The step counts them before it splits the batch and adds them to it,
    the same number for every example, so that the mean of the micro-batches' losses is the loss of
    the batch. `totals`: batch -> {metric: scalar}, sums over the batch.
    """

    function: LossFunction
    normalizers: Callable[[Batch, int], dict[str, jax.Array]] = no_normalizers
    totals: Callable[[Batch], dict[str, jax.Array]] = no_totals

    def __call__(
        self, model: Blip3o, batch: Batch, keys_B: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss and its metrics over the rows given."""
        return self.function(model, batch, keys_B)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Define a stage: the `parts` of its model, the `fields` of an example (data/examples.py) that
    its loss reads, its default filter `trainable`, its loss and the images of `preview`.
    `normalizers` and `totals`: see `Loss`.
    """

    parts: tuple[str, ...]
    fields: tuple[str, ...]
    trainable: tuple[str, ...]
    loss: StageLoss
    preview: StagePreview | None = None
    normalizers: Callable[[Batch, int], dict[str, jax.Array]] = no_normalizers
    totals: Callable[[Batch], dict[str, jax.Array]] = no_totals


STAGES: dict[str, Stage] = {
    "autoencoder": Stage(("vae",), ("pixels",), ("vae/.*",), autoencoder_loss, autoencoder_preview),
    "contrastive": Stage(
        ("tokenizer", "text_tower", "patch_readout"),
        ("tokenizer_pixels", "caption"),
        ("tokenizer/encoder/.*", "text_tower/.*", "patch_readout/.*"),
        contrastive_loss,
    ),
    "tokenizer": Stage(
        ("tokenizer",),
        ("tokenizer_pixels",),
        (r"tokenizer/(?!encoder/).*",),
        tokenizer_loss,
    ),
    # The published freezing: of the DiT only the caption projection and its norm are trained.
    "joint": Stage(
        ("tokenizer", "ar", "connector", "dit", "vae"),
        ("row", "pixels", "tokenizer_pixels"),
        ("ar/.*", "connector/.*", "dit/caption.*"),
        joint_loss,
        joint_preview,
        joint_normalizers,
        joint_totals,
    ),
}


def stage_parts(config: Config) -> tuple[str, ...]:
    """Return the parts of a run's model: the stage's, and for the joint stage the connectors of
    editing that the configuration turns on.
    """
    editing = config.model.editing
    extra = {"latent_connector": editing.latents, "feature_connector": editing.features}
    return STAGES[config.stage].parts + tuple(
        name for name, there in extra.items() if there and config.stage == "joint"
    )


def make_loss(config: Config, image_token_offset: int) -> Loss:
    """Return the loss of the configured stage; `image_token_offset` is the vocabulary id of the
    first codebook entry (joint stage only).
    """
    stage = STAGES[config.stage]
    function = functools.partial(
        stage.loss, loss=config.loss, image_token_offset=image_token_offset
    )
    return Loss(function, stage.normalizers, stage.totals)


def make_preview(
    config: Config, image_token_offset: int
) -> Callable[[Blip3o, Batch, jax.Array], jax.Array] | None:
    """Return (model, batch, keys) -> images in [0, 1] that show the stage's progress; None for
    stages without images, and with `config.preview` 0.
    """
    preview = STAGES[config.stage].preview
    if preview is None or not config.preview:
        return None
    return functools.partial(preview, loss=config.loss, image_token_offset=image_token_offset)
