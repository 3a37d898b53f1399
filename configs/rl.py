"""Reinforcement learning from a trained model: what improves, and by which reward.

Command:
    blip3o rl --config=configs/rl.py:ocr:published --workdir=runs/ocr --config.rl.prompts_file=prompts.jsonl
    The argument is the recipe and the checkpoint (imported by `blip3o convert import`, or trained here), whose model and text
    tokenizer are taken as they are. Recipes: ocr and geneval (GRPO on the image tokens, diffusion head frozen), flow
    (Flow-GRPO on the diffusion head, GenEval), hybrid (both, with the advantages of the same images), shapes (the demo's data).
Hardware: ocr, geneval: the published recipe's batch is 8 prompts x 16 images a device on 8 devices of 80 GB; here
    rl.prompts x rl.group images over the whole mesh, 64 chips of v5p for 1.7B (`--config.mesh.*`).
Duration: 1000 updates are the published recipe's order of size.
Expected: the reward rises; run `blip3o evaluate` before and after. Sizes of 1.7B have not been run here.

The rewards ocr and geneval want the extra [rl], or a directory with a detector: docs/rl.md.
"""

import dataclasses

from blip3o_jax import config
from blip3o_jax.train import checkpoint

PARTS = ("tokenizer", "ar", "connector", "dit", "vae")
GENEVAL = config.RewardConfig(
    name="geneval", options=(("detector", "transformers"), ("path", "detector"), ("colour_path", "clip"))
)
RECIPES = {
    "ocr": config.RlConfig(rewards=(config.RewardConfig(name="ocr"),)),
    "geneval": config.RlConfig(rewards=(GENEVAL,)),
    "flow": config.RlConfig(policy="flow", rewards=(GENEVAL,)),
    "hybrid": config.RlConfig(policy="both", rewards=(GENEVAL,)),
    "shapes": config.RlConfig(rewards=(config.RewardConfig(name="shapes"),)),
}


def get_config(argument: str) -> config.Config:
    recipe, _, path = argument.partition(":")
    config.check_choice("recipe", recipe, RECIPES)
    root, step = checkpoint.find(path)
    given = checkpoint.read_config(root)
    model = given.model
    # Steps of 1e-6 vanish in bfloat16.
    wide = {part: dataclasses.replace(getattr(model, part), param_dtype="float32") for part in ("ar", "dit")}
    text = dataclasses.replace(model.text, path=str(root / "text"), train_size=0)
    sampling = dataclasses.replace(given.sampling, temperature=1.0, top_k=0, top_p=1.0, token_guidance=1.0, batch_size=64)
    return config.Config(
        stage="joint",
        steps=1000,
        log_every=1,
        preview=0,
        model=dataclasses.replace(model, text=text, **wide),
        data=config.DataConfig(max_length=given.data.max_length),
        optimizer=config.OptimizerConfig(learning_rate=1e-6, end_learning_rate=0.0, weight_decay=0.0),
        mesh=dataclasses.replace(given.mesh, data=-1, fsdp=1, strategy="dp") if recipe == "shapes" else config.MeshConfig(),
        checkpoint=config.CheckpointConfig(every=50, init_from=tuple((part, str(root / str(step))) for part in PARTS)),
        sampling=given.sampling,
        rl=dataclasses.replace(RECIPES[recipe], rollout=sampling),
    )
