r"""Train by reinforcement learning from a checkpoint: GRPO on image tokens, Flow-GRPO, or both.

Command:
    blip3o rl --config=configs/rl.py:ocr:published --workdir=runs/ocr \
        --config.rl.prompts_file=prompts.jsonl
    The argument is the recipe and the checkpoint (imported by `blip3o convert import`, or trained
    here), which provides model and text tokenizer. Recipes: ocr and geneval (GRPO on the image
    tokens, diffusion head frozen), flow (Flow-GRPO on the diffusion head, GenEval), hybrid (both,
    with the advantages of the same images). For the demo's model: shapes (its last stage) and words
    (few words, both policies, the reward ocr; docs/results/rl-cpu.md).
Hardware: ocr, geneval: the published recipe's batch is 8 prompts x 16 images a device on 8 devices
    of 80 GB; here rl.num_prompts x rl.num_generations images over the whole mesh, 64 chips of v5p
    for 1.7B (`--config.mesh.*`).
Duration: unknown; the published recipe has about 1000 updates.
Expected: the reward rises; run `blip3o evaluate` before and after. Sizes of 1.7B have not been run
    here.

The rewards ocr and geneval need the extra [rl], or a directory with a detector: docs/rl.md.
"""

import dataclasses

from blip3o_jax import config
from blip3o_jax.demo.recipe import reinforcement
from blip3o_jax.train.initialize import from_checkpoint

GENEVAL = config.RewardConfig(
    name="geneval",
    options=(("detector", "transformers"), ("path", "detector"), ("colour_path", "clip")),
)
RECIPES = {
    "ocr": config.RlConfig(rewards=(config.RewardConfig(name="ocr"),)),
    "geneval": config.RlConfig(rewards=(GENEVAL,)),
    "flow": config.RlConfig(policy="flow", rewards=(GENEVAL,)),
    "hybrid": config.RlConfig(policy="both", rewards=(GENEVAL,)),
}


def get_config(argument: str) -> config.Config:
    recipe, _, path = argument.partition(":")
    config.check_choice("recipe", recipe, (*RECIPES, "shapes", "words"))
    config.check(
        bool(path),
        f"configs/rl.py:{recipe} names no checkpoint to start from:"
        f" configs/rl.py:{recipe}:CHECKPOINT",
    )
    if recipe in ("shapes", "words"):
        demo = reinforcement(path, "")
        return demo if recipe == "shapes" else words(demo)
    base = from_checkpoint(path, trained=("ar", "dit"))
    sampling = dataclasses.replace(
        base.sampling, temperature=1.0, top_k=0, top_p=1.0, token_guidance=1.0, batch_size=64
    )
    return dataclasses.replace(
        base,
        steps=1000,
        log_every=1,
        preview=0,
        optimizer=config.OptimizerConfig(
            learning_rate=1e-6, end_learning_rate=0.0, weight_decay=0.0
        ),
        checkpoint=dataclasses.replace(base.checkpoint, every=50),
        rl=dataclasses.replace(RECIPES[recipe], rollout=sampling),
    )


def words(demo: config.Config) -> config.Config:
    """Return the recipe for words. Both policies learn, since correct text depends on the letters
    that the diffusion head renders as much as on the tokens.
    """
    flow = dataclasses.replace(demo.rl.flow, kl_coef=0.0)
    rl = dataclasses.replace(
        demo.rl, policy="both", num_prompts=8, rewards=(config.RewardConfig(name="ocr"),), flow=flow
    )
    return dataclasses.replace(
        demo, steps=80, checkpoint=dataclasses.replace(demo.checkpoint, every=80), rl=rl
    )
