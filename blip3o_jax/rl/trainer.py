"""Run reinforcement learning as a method of the training loop: `blip3o rl`."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax import lora
from blip3o_jax.config import Config, ConfigError, UserError, check
from blip3o_jax.data.prompts import Prompt, read_prompts
from blip3o_jax.parallel.distributed import process_index
from blip3o_jax.rl import rollout_programs
from blip3o_jax.rl.log import RolloutLog
from blip3o_jax.rl.loss import make_loss
from blip3o_jax.rl.registry import has_reference, make_policies
from blip3o_jax.rl.rewards.pool import RewardPool
from blip3o_jax.rl.rollouts import RolloutIterator
from blip3o_jax.text.vocabulary import Vocabulary
from blip3o_jax.train import loop
from blip3o_jax.train.fingerprint import weights_fingerprint
from blip3o_jax.train.initialize import restore_init_parts
from blip3o_jax.train.loop import RunContext, Summary, TrainerSpec
from blip3o_jax.train.state import TrainState, merge_trees
from blip3o_jax.train.train_step import make_step
from blip3o_jax.train.vocabulary import with_vocabulary


def run(config: Config, workdir: str | pathlib.Path) -> Summary:
    """Train `config.steps` updates under `workdir`, from its last checkpoint where there is one.
    See `loop.train`.
    """
    return loop.train(resolved(config), workdir, ReinforcementLearning())


def resolved(config: Config) -> Config:
    """Return the configuration with the settings that follow from `rl`: the batch is a rollout.

    Raises ConfigError for settings that exclude each other.
    """
    rl = config.rl
    check(
        config.stage == "joint",
        f"stage={config.stage!r}: reinforcement learning is for a model of stage 'joint'",
    )
    check(bool(rl.rewards), "rl.rewards is empty: name at least one reward")
    check(bool(rl.prompts_file), "rl.prompts_file is empty: name a file of prompts")
    check(
        bool(config.checkpoint.init_from),
        "checkpoint.init_from is empty: reinforcement learning starts from a trained model",
    )
    for name, value in (("steps", config.steps), ("checkpoint.every", config.checkpoint.every)):
        check(
            value % rl.num_iterations == 0,
            f"{name}={value} must be a multiple of rl.num_iterations={rl.num_iterations}: "
            "a run can only resume between two rollouts",
        )
    trainable = tuple(pattern for policy in make_policies(config) for pattern in policy.trainable)
    return dataclasses.replace(
        config,
        trainable=config.trainable or trainable,
        data=dataclasses.replace(config.data, batch_size=rl.num_prompts * rl.num_generations),
    )


class ReinforcementLearning:
    """Implement `loop.Method`: batches are rollouts with their rewards."""

    def __init__(self) -> None:
        self._pool: RewardPool | None = None

    def open(self, config: Config) -> None:
        rl = config.rl
        self._prompts = read_prompts(rl.prompts_file)
        self._pool = RewardPool(
            rl.rewards, workers=rl.workers, timeout=rl.timeout, retries=rl.retries
        )
        self._pool.check([(prompt.text, prompt.metadata) for prompt in self._prompts])

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def vocabulary(self, config: Config, workdir: pathlib.Path) -> tuple[Config, Vocabulary | None]:
        return with_vocabulary(config, [], workdir)

    def begin(self, context: RunContext, state: TrainState, position: Any) -> TrainerSpec:
        config = context.config
        pool, vocabulary = self._pool, context.vocabulary
        assert pool is not None, "open() makes the pool"
        assert vocabulary is not None, "a run of reinforcement learning has text"
        context.strategy.check_batch(
            config.data.batch_size // rollout_programs.num_micro_batches(config.rl)
        )
        policies = make_policies(config)
        learned = frozenset().union(*(policy.parts for policy in policies))
        if idle := set(context.plan.abstract["params"]) - learned:
            raise ConfigError(
                f"trainable={config.trainable} names {', '.join(sorted(idle))}, which "
                f"rl.policy={config.rl.policy!r} does not train"
            )
        reference, identity = None, ""
        if has_reference(policies):
            reference = _reference(context, state, fresh=position is None)
            identity = weights_fingerprint(lora.zero_idle_factors(reference))
        position = position or {"rollout": 0, "reference": identity}
        position = with_prompts(position, self._prompts, config.rl.prompts_file)
        if context.start % config.rl.num_iterations:
            raise ConfigError(
                f"rl.num_iterations={config.rl.num_iterations} does not divide the {context.start} "
                f"steps that {context.workdir} has done: a rollout would end between two "
                "checkpoints; keep the value that the run began with"
            )
        # A run may start without a reference policy and resume with one, or the other way round.
        position = position | {"reference": position["reference"] or identity}
        if identity not in ("", position["reference"]):
            raise UserError(
                "checkpoint.init_from holds other weights than when this run started, and they are "
                "the reference policy of rl.kl_coef: restore them, or start in another --workdir"
            )
        open_log = functools.partial(
            RolloutLog,
            context.workdir,
            process_index(),
            position["rollout"],
            config.seed,
            keep_images=config.rl.keep_images,
        )
        batches = RolloutIterator(context, self._prompts, pool, reference, position, open_log)
        image_ids = vocabulary.image_token_offset, vocabulary.image_token_end
        loss = make_loss(config, image_ids, context.strategy.batch_shards)
        return TrainerSpec(batches, make_step(config, context.plan, context.strategy, loss))


def with_prompts(position: dict[str, Any], prompts: list[Prompt], path: str) -> dict[str, Any]:
    """Return the position with a digest of the prompts and their metadata, in their order.

    Raises UserError if the position has the digest of other prompts.
    """
    content = [[prompt.text, prompt.metadata] for prompt in prompts]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    if position["rollout"] and position.get("prompts") != digest:
        raise UserError(
            f"rl.prompts_file={path} holds other prompts, or in another order, than when this run "
            "started: some would be repeated and others left out; bring them back, or start in "
            "another --workdir"
        )
    return position | {"prompts": digest}


def _reference(context: RunContext, state: TrainState, *, fresh: bool) -> Any:
    """Return the trainable parameters that the run started from.

    They are a copy, since the step donates the state. A run that resumes reads them from
    `checkpoint.init_from`; low-rank factors that the run initialised are switched off.
    """
    if fresh:
        return jax.jit(
            lambda params: jax.tree.map(jnp.copy, params),
            out_shardings=context.plan.shardings["params"],
        )(state["params"])
    given = restore_init_parts(context.config, context.plan, context.strategy)
    given = {part: groups["params"] for part, groups in given.items() if "params" in groups}
    return merge_trees(given, lora.disable_lora(state["params"]))
