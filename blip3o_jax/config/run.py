"""Set a run: one stage on one model, data mixture and mesh."""

import dataclasses
import typing
from typing import Annotated, Literal

from blip3o_jax.config.constraints import Bounds, Increasing
from blip3o_jax.config.data import DataConfig
from blip3o_jax.config.errors import check
from blip3o_jax.config.fields import ConfigGroup
from blip3o_jax.config.mesh import MeshConfig
from blip3o_jax.config.model import ModelConfig
from blip3o_jax.config.rl import RlConfig
from blip3o_jax.config.sampling import SamplingConfig
from blip3o_jax.config.train import CheckpointConfig, LossConfig, OptimizerConfig
from blip3o_jax.config.types import PositiveInt, Regex, Seed

StageName = Literal["autoencoder", "contrastive", "tokenizer", "joint"]
STAGE_NAMES: tuple[str, ...] = typing.get_args(StageName)


@dataclasses.dataclass(frozen=True)
class Config(ConfigGroup):
    """Set a run: one stage on one model, data mixture and mesh."""

    stage: StageName = "joint"
    """Stage of training: which parts are trained, and by which loss."""
    seed: Seed = 0
    """Seed of everything random: initial weights, order of the records, noise, sampling."""
    steps: Annotated[int, Bounds(1, 2**30)] = 1000
    """Optimizer steps of the whole run. A resumed run continues up to this step."""
    log_every: PositiveInt = 10
    """Steps between two records of metrics. The first and the last step are always recorded."""
    eval_every: Annotated[int, Bounds(0, 2**30)] = 0
    """Steps between two evaluations of the held-out records (`data.held_out`), which are also
    evaluated at the last step; 0 evaluates never.
    """
    eval_batches: Annotated[int, Bounds(1, 2**20)] = 4
    """Batches of held-out records in an evaluation, the same ones every time."""
    preview: Annotated[int, Bounds(0, 1024)] = 8
    """Rows of a batch whose images are written to TensorBoard at each checkpoint; 0 writes none."""
    profile_steps: Annotated[tuple[PositiveInt, PositiveInt], Increasing()] | None = None
    """First and last step of the window that JAX's profiler traces into the workdir; `None` traces
    nothing.
    """
    trainable: tuple[Regex, ...] = ()
    """Regular expressions over parameter paths such as `ar/layers/mlp/up/kernel`: what they match
    is trained, all else is frozen. `()` takes the stage's own; that of `joint` is the published
    freezing (AR, connector and the DiT's caption layers are trained).
    """
    max_nonfinite: PositiveInt = 10
    """Consecutive steps with a non-finite loss or gradient after which the run stops."""
    watchdog: Annotated[float, Bounds(0, 1e7, note="0 switches it off")] = 600.0
    """Seconds without progress after which stderr names the stuck host and its phase."""
    model: ModelConfig = ModelConfig()
    """Parts of the model, and the sizes of its images."""
    data: DataConfig = DataConfig()
    """Data sets, and how their records become batches."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate."""
    loss: LossConfig = LossConfig()
    """Weights of the losses."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each mesh axis, and the sharding strategy."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written, and those that the run starts from."""
    sampling: SamplingConfig = SamplingConfig()
    """How images are sampled. The checkpoint stores it for `blip3o sample`."""
    rl: RlConfig = RlConfig()
    """Online reinforcement learning (`blip3o rl`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.data.batch_size % self.optimizer.accumulate == 0,
            f"data.batch_size={self.data.batch_size} must be a multiple of"
            f" optimizer.accumulate={self.optimizer.accumulate}",
        )
        check(
            not self.eval_every or self.data.held_out > 0,
            f"eval_every={self.eval_every} evaluates held-out records: set data.held_out above 0",
        )
        check(
            self.stage == "joint" or self.checkpoint.image_embedding_init == "random",
            f"checkpoint.image_embedding_init={self.checkpoint.image_embedding_init!r} belongs to"
            f" stage 'joint'; stage {self.stage!r} has no AR",
        )
        instruction = self.loss.instruction_dropout
        both = self.loss.condition_dropout
        check(
            instruction <= 1 - both,
            f"loss.instruction_dropout={instruction} and loss.condition_dropout={both} are"
            " fractions of different rows: their sum must lie between 0 and 1",
        )
        check(
            self.data.pack == 1 or (self.stage == "joint" and self.loss.condition_span == "exact"),
            f"data.pack={self.data.pack} is for stage 'joint' with loss.condition_span='exact': 1"
            " has a row for each example",
        )
        check(
            not (
                self.stage == "joint"
                and self.data.cache_dir
                and self.model.editing.reference_slots
                and self.model.editing.features
            ),
            "data.cache_dir keeps no features, which model.editing.features reads: empty"
            " data.cache_dir",
        )
        check(
            not (self.loss.caption_dropout and self.model.template.supervise_prompt),
            "loss.caption_dropout hides prompts that model.template.supervise_prompt trains on:"
            " turn one of them off",
        )

    @property
    def title(self) -> str:
        """Return what messages call the run."""
        return "rl" if self.rl.rewards else self.stage
