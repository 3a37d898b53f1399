"""Joint training on from a checkpoint with all its parts: an imported one (`blip3o convert import`), or one trained here.

Command:
    blip3o convert import --source=BLIP3o-NEXT --diffusion=SANA --out=published
    blip3o train --config=configs/finetune.py:published --workdir=runs/finetune --config.data.path='captions/*.tar'
    The argument is the checkpoint; its model, vocabulary and text tokenizer are taken as they are. Then, to hand it on,
    blip3o convert export --source=runs/finetune --out=finetuned
Hardware: that of configs/instruct.py for the published sizes; the mesh is fsdp over all devices (`--config.mesh.*`).
Duration: 7000 steps at batch 128 are the published instruction tuning.
Expected: depends on the data. Steps, batch and learning rate are those of configs/instruct.py.

Trained parts (AR, connector, the DiT) are held in float32 whatever the checkpoint's dtype, since steps of 5e-5 vanish in
bfloat16; frozen ones (tokenizer, autoencoder) as they are. Export with --dtype=bfloat16 to get the published size back.
"""

import dataclasses

from blip3o_jax import config
from blip3o_jax.train import checkpoint

PARTS = ("tokenizer", "ar", "connector", "dit", "vae")


def get_config(path: str) -> config.Config:
    root, step = checkpoint.find(path)
    given = checkpoint.read_config(root)
    model, wide = given.model, {"param_dtype": "float32"}
    extra = {"latent_connector": model.editing.latents, "feature_connector": model.editing.features}
    parts = PARTS + tuple(name for name, there in extra.items() if there)
    return config.Config(
        stage="joint",
        steps=7_000,
        log_every=50,
        model=dataclasses.replace(
            model,
            text=dataclasses.replace(model.text, path=str(root / "text"), train_size=0),
            ar=dataclasses.replace(model.ar, **wide),
            connector=dataclasses.replace(model.connector, **wide),
            dit=dataclasses.replace(model.dit, **wide),
        ),
        data=config.DataConfig(batch_size=128, max_length=given.data.max_length, workers=16),
        optimizer=config.OptimizerConfig(learning_rate=5e-5, end_learning_rate=1e-5),
        sampling=given.sampling,
        checkpoint=config.CheckpointConfig(every=500, init_from=tuple((part, str(root / str(step))) for part in parts)),
    )
