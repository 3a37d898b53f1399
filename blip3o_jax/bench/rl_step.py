"""Time one step of reinforcement learning by phase, here and as in the published code: `bench rl`.

    phase        here                                   as published
    sample       prefill of a prompt once for a group   prefill for every image
                 condition: hidden states of sampling   a second pass over prompt and image
    reference,   a shared prefix for a group            a full row for every image
    update       logits of image ids alone, in blocks   logits of the vocabulary, all tokens at once

Both ways sample with the same keys, from the distribution over image ids, with the same loop of
single tokens, denoising steps and autoencoder, get their rewards from the same processes, and take
the same optimizer step; so the images and the updates are the same. The published code's own
loop also computes the whole vocabulary's logits for every token, and the connector at every
denoising step: neither is counted against it here.

The two alternate, each on its own copy of the state.
"""

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from blip3o_jax import files, nn
from blip3o_jax.ar.logits import project
from blip3o_jax.ar.sampling import guided_logits
from blip3o_jax.bench.peer.report import machine
from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config, RlConfig, UserError
from blip3o_jax.data.prompts import read_prompts
from blip3o_jax.dit import sampler
from blip3o_jax.parallel.batches import global_batch
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.provenance import provenance
from blip3o_jax.rl import grpo, reward_batch, rollout_programs, trainer
from blip3o_jax.rl.flow_policy import guided_velocity_fn
from blip3o_jax.rl.log_probs import teacher_forced_states
from blip3o_jax.rl.loss import make_loss, normalizers
from blip3o_jax.rl.prompts import PromptRows, prompt_indices
from blip3o_jax.rl.protocol import RolloutArrays
from blip3o_jax.rl.reward_batch import RewardBatch
from blip3o_jax.rl.rewards.pool import RewardPool
from blip3o_jax.sampling_programs import (
    prepare_latents,
    sample_image_tokens,
    sampling_keys,
    to_uint8,
)
from blip3o_jax.train.initialize import restore_init_parts
from blip3o_jax.train.stages import Loss
from blip3o_jax.train.state import (
    StatePlan,
    TrainState,
    create_state,
    plan_state,
    run_strategy,
)
from blip3o_jax.train.train_step import make_step
from blip3o_jax.train.vocabulary import with_vocabulary

PHASES = ("sample", "reward", "reference", "update")
VARIANTS = ("here", "as published")


@dataclasses.dataclass
class _Variant:
    """Hold one variant of a step, with its state. `sample` takes a row of tokens for each prompt,
    or for each image."""

    sample: Callable[..., tuple[jax.Array, RolloutArrays]]
    reference: Callable[[Any, Any, RolloutArrays], RolloutArrays]
    step: Callable[[TrainState, RolloutArrays], tuple[TrainState, dict[str, jax.Array]]]
    state: TrainState
    rows_per_prompt: int
    seconds: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {phase: [] for phase in PHASES}
    )


def bench(config: Config, out: pathlib.Path, *, rounds: int, command: str) -> dict[str, Any]:
    """Time `rounds` rollouts and updates of both variants and write `out`/rl.json. UserError for
    settings that cannot be compared."""
    config = trainer.resolved(config)
    rl = config.rl
    if rl.policy != "ar" or not rl.kl_coef or rl.rollout.top_k or rl.rollout.top_p < 1:
        raise UserError(
            "bench rl compares rl.policy=ar with rl.kl_coef above 0, top_k=0 and top_p=1, as "
            "published: set them"
        )
    prompts = read_prompts(rl.prompts_file)
    strategy = run_strategy(config)
    with tempfile.TemporaryDirectory() as directory:
        config, vocabulary = with_vocabulary(config, [], pathlib.Path(directory))
    assert vocabulary is not None, "a run of reinforcement learning has text"
    plan = plan_state(config, strategy)
    start = lambda: create_state(
        config, plan, restore_init_parts(config, plan, strategy), vocabulary.image_token_offset
    )
    ids, whole = (
        (vocabulary.image_token_offset, vocabulary.image_token_end),
        config.model.ar.vocab_size,
    )
    copied = jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=plan.shardings["params"])
    variants = {
        "here": _Variant(
            rollout_programs.make_rollout(config, plan, strategy, ids),
            rollout_programs.make_reference(config, plan, strategy, ids),
            make_step(config, plan, strategy, make_loss(config, ids, strategy.batch_shards)),
            start(),
            1,
        ),
        "as published": _Variant(
            _published_rollout(config, plan, strategy, ids),
            _published_reference(config, plan, strategy, ids, whole),
            make_step(config, plan, strategy, _published_loss(config, ids, whole)),
            start(),
            rl.num_generations,
        ),
    }
    reference = copied(variants["here"].state["params"])
    rows, first = PromptRows(prompts, config, vocabulary), {}
    pool = RewardPool(rl.rewards, workers=rl.workers, timeout=rl.timeout, retries=rl.retries)
    try:
        for number in range(rounds + 1):
            chosen = [
                prompts[i]
                for i in prompt_indices(len(prompts), number, rl.num_prompts, config.seed)
            ]
            for name in VARIANTS if number % 2 else VARIANTS[::-1]:
                found = _step(
                    config,
                    strategy,
                    variants[name],
                    reference,
                    rows.tokenize(chosen),
                    chosen,
                    pool,
                    number,
                )
                if number == 0:  # compiles, and both start from the same state
                    first[name] = found
                    variants[name].seconds = {phase: [] for phase in PHASES}
    finally:
        pool.close()
    report = {
        **provenance(command),
        "machine": machine(),
        "devices": len(jax.devices()),
        "images": rl.num_prompts * rl.num_generations,
        "group": rl.num_generations,
        "prompt_tokens": rows.length,
        "image_tokens": config.model.tokenizer.num_tokens,
        "vocabulary": {"all": whole, "image": ids[1] - ids[0]},
        "denoising_steps": rl.rollout.steps,
        "seconds": {name: variant.seconds for name, variant in variants.items()},
        "pixels": _pixels_seconds(
            config,
            plan,
            strategy,
            variants["here"].state,
            rl.num_prompts * rl.num_generations,
            rounds,
        ),
        "equal": _compared(first["here"], first["as published"]),
    }
    report["medians"] = {
        name: {phase: float(np.median(x)) for phase, x in variant.seconds.items()}
        for name, variant in variants.items()
    }
    totals = {
        name: np.sum([variant.seconds[phase] for phase in PHASES], axis=0)
        for name, variant in variants.items()
    }
    report["step"] = {name: float(np.median(total)) for name, total in totals.items()}
    ratios = totals["as published"] / totals["here"]
    report["ratio"] = {
        "median": float(np.median(ratios)),
        "min": float(ratios.min()),
        "max": float(ratios.max()),
    }
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "rl.json", report)
    return report


def print_report(report: dict[str, Any]) -> None:
    """Print the seconds of each phase and their ratios."""
    table = Table(title=f"A step on {report['images']} images: median seconds")
    for column in ("phase", *VARIANTS, "ratio"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    rows = {phase: [report["medians"][variant][phase] for variant in VARIANTS] for phase in PHASES}
    for phase, (here, published) in (
        rows | {"step": [report["step"][variant] for variant in VARIANTS]}
    ).items():
        table.add_row(phase, f"{here:.3f}", f"{published:.3f}", f"{published / here:.2f}")
    Console().print(table)
    ratio, equal = report["ratio"], report["equal"]
    print(f"of sampling, {report['pixels']:.3f} s are denoising and autoencoder, the same in both")
    print(
        f"a step here is {ratio['median']:.2f} x as fast ({ratio['min']:.2f} to {ratio['max']:.2f} "
        "over the rounds)"
    )
    print("first step: " + ", ".join(f"{name} {value:.2g}" for name, value in equal.items()))


def _step(
    config: Config,
    strategy: Strategy,
    variant: _Variant,
    reference: Any,
    rows: tuple[np.ndarray, np.ndarray],
    chosen: list[Any],
    pool: RewardPool,
    number: int,
) -> dict[str, np.ndarray]:
    """Run one step of one variant; return the values in which the variants must agree."""
    rl, state = config.rl, variant.state
    count = rl.num_prompts * rl.num_generations
    tokens, lengths = (np.repeat(x, variant.rows_per_prompt, axis=0) for x in rows)
    indices_B = np.arange(number * count, (number + 1) * count).astype(np.uint32)
    marks = [time.monotonic()]
    pixels, record = jax.block_until_ready(
        variant.sample(
            state["params"],
            state["frozen"],
            tokens,
            lengths,
            indices_B,
            np.uint32(config.seed),
            np.uint32(number),
        )
    )
    marks.append(time.monotonic())
    each = [prompt for prompt in chosen for _ in range(rl.num_generations)]
    images = np.asarray(pixels)
    result = pool.submit(images, [p.text for p in each], [p.metadata for p in each]).result()
    rewards = RewardBatch(result.total_B, result.failed_B, result.parts)
    marks.append(time.monotonic())
    record |= jax.block_until_ready(variant.reference(reference, state["frozen"], record))
    marks.append(time.monotonic())
    batch = record | global_batch(
        reward_batch.loss_inputs(rewards, rl), strategy.batch_sharding(), list(range(count)), count
    )
    variant.state, metrics = jax.block_until_ready(variant.step(state, batch))
    marks.append(time.monotonic())
    for phase, seconds in zip(PHASES, np.diff(marks), strict=True):
        variant.seconds[phase].append(float(seconds))
    return {
        "images": images,
        "ids": np.asarray(record["image_ids"]),
        "reward": result.total_B,
        "reference": np.asarray(record["reference_logprobs"]),
        "loss": np.asarray(metrics["loss"]),
        "grad_norm": np.asarray(metrics["grad_norm"]),
    }


def _compared(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the fractions of tokens and pixels that are equal, and the greatest differences of
    the rest."""
    gap = lambda name: float(np.max(np.abs(a[name].astype(np.float64) - b[name])))
    return {
        "tokens equal": float(np.mean(a["ids"] == b["ids"])),
        "pixels equal": float(np.mean(a["images"] == b["images"])),
        "reward gap": gap("reward"),
        "reference gap": gap("reference"),
        "loss gap": gap("loss"),
        "relative gradient gap": gap("grad_norm") / float(a["grad_norm"]),
    }


def _published_rollout(
    config: Config, plan: StatePlan, strategy: Strategy, image_ids: tuple[int, int]
) -> Callable[..., Any]:
    """Make a rollout as `rollout_programs.make_rollout` does, with a row of tokens for each
    image."""
    rl, cfg = config.rl, config.model

    def rollout_images(
        params: Any,
        frozen: Any,
        tokens_BL: jax.Array,
        lengths_B: jax.Array,
        indices_B: jax.Array,
        seed: jax.Array,
        number: jax.Array,
    ) -> tuple[jax.Array, RolloutArrays]:
        del number
        model = plan.model(params, frozen)
        tokens_BL = nn.constrain(tokens_BL, "batch", None)
        token_keys_B, noise_keys_B = sampling_keys(seed, indices_B)
        sampled = sample_image_tokens(
            model, tokens_BL, lengths_B, token_keys_B, rl.rollout, image_ids
        )
        hidden_BTD = teacher_forced_states(model.ar, tokens_BL, lengths_B, sampled.ids_BN, 1)
        z_BHWC = _sample_latents(model, config, hidden_BTD, prepare_latents(cfg, noise_keys_B))
        record = {
            "tokens": tokens_BL,
            "lengths": lengths_B,
            "image_ids": sampled.ids_BN,
            "logprobs": sampled.logprobs_BN,
        }
        return to_uint8(model.pixels(z_BHWC)), record

    return strategy.jit(rollout_images, out_shardings=strategy.batch_sharding())


def _sample_latents(
    model: Blip3o, config: Config, hidden_BTD: jax.Array, noise_BHWC: jax.Array
) -> jax.Array:
    settings = config.rl.rollout
    with nn.part("dit"):
        velocity = guided_velocity_fn(model, hidden_BTD, settings)
        return sampler.euler(velocity, noise_BHWC, steps=settings.steps, flow=config.model.flow)


def _published_reference(
    config: Config, plan: StatePlan, strategy: Strategy, image_ids: tuple[int, int], vocabulary: int
) -> Callable[[Any, Any, RolloutArrays], RolloutArrays]:
    def reference(params: Any, frozen: Any, record: RolloutArrays) -> RolloutArrays:
        logprobs_BN, _ = _published_logprobs(
            plan.model(params, frozen), record, config.rl, image_ids, vocabulary
        )
        return {"reference_logprobs": logprobs_BN}

    return strategy.jit(reference, out_shardings=strategy.batch_sharding())


def _published_loss(config: Config, image_ids: tuple[int, int], vocabulary: int) -> Loss:
    """Make the loss as `rl.loss.make_loss` does for image tokens."""

    def loss(
        model: Blip3o, record: RolloutArrays, keys_B: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del keys_B
        valid = record["valid"] > 0, record["valid_fraction"]
        logprobs_BN, entropy_BN = _published_logprobs(
            model, record, config.rl, image_ids, vocabulary
        )
        value, metrics = grpo.policy_loss(
            logprobs_BN,
            record["logprobs"],
            record["reference_logprobs"],
            record["advantage"],
            *valid,
            cfg=config.rl,
        )
        return value, metrics | {
            "entropy": grpo.masked_mean(jax.lax.stop_gradient(entropy_BN), *valid)
        }

    return Loss(loss, normalizers)


def _published_logprobs(
    model: Blip3o, record: RolloutArrays, rl: RlConfig, image_ids: tuple[int, int], vocabulary: int
) -> tuple[jax.Array, jax.Array]:
    """Return log-probabilities of the image tokens and entropies [B, N], from logits over the whole
    vocabulary, in which all except image ids are masked, at all image tokens and the one after
    them."""
    settings = rl.rollout
    branches = 1 if settings.token_guidance == 1.0 else 2
    hidden_BTD = teacher_forced_states(
        model.ar, record["tokens"], record["lengths"], record["image_ids"], branches
    )
    logits_BTV = (
        guided_logits(project(hidden_BTD, model.ar.head((0, vocabulary))), settings.token_guidance)
        / settings.temperature
    )
    index_V = jnp.arange(vocabulary)
    is_image_V = (index_V >= image_ids[0]) & (index_V < image_ids[1])
    logprobs_BNV = jax.nn.log_softmax(jnp.where(is_image_V, logits_BTV, -jnp.inf)[:, :-1])
    picked_BN = jnp.take_along_axis(logprobs_BNV, record["image_ids"][..., None], axis=-1)[..., 0]
    entropy_BN = -jnp.sum(
        jnp.where(is_image_V, jnp.exp(logprobs_BNV) * jnp.where(is_image_V, logprobs_BNV, 0), 0),
        axis=-1,
    )
    return picked_BN, entropy_BN


def _pixels_seconds(
    config: Config, plan: StatePlan, strategy: Strategy, state: TrainState, images: int, rounds: int
) -> float:
    """Return the median seconds from hidden states to pixels, which both variants share."""

    def pixels(params: Any, frozen: Any, hidden_BTD: jax.Array, noise_BHWC: jax.Array) -> jax.Array:
        model = plan.model(params, frozen)
        return to_uint8(model.pixels(_sample_latents(model, config, hidden_BTD, noise_BHWC)))

    cfg, at = config.model, strategy.batch_sharding()
    hidden = jax.device_put(
        np.ones((images, cfg.tokenizer.num_tokens + 1, cfg.ar.hidden_size), cfg.ar.dtype), at
    )
    noise = jax.device_put(
        np.ones((images, cfg.latent_size, cfg.latent_size, cfg.vae.latent_channels), np.float32), at
    )
    program = strategy.jit(pixels, out_shardings=at)
    seconds = []
    for _ in range(rounds + 1):
        began = time.monotonic()
        jax.block_until_ready(program(state["params"], state["frozen"], hidden, noise))
        seconds.append(time.monotonic() - began)
    return float(np.median(seconds[1:]))
