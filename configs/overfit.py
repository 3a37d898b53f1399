"""Memorize your own pictures: the demo's model on a folder or tar of a few captioned images, from
random weights.

Command:
    blip3o train --config=configs/overfit.py --config.data.path=photos.tar
    blip3o sample --checkpoint=runs/overfit --prompts_file=captions.txt --out=samples
Hardware: two CPU cores, no accelerator.
Duration: 9 to 17 minutes for 16 photographs, sampling included, depending on the machine's load.
Expected: each of the 16 samples is nearest, by mean squared error over pixels, to its own
    photograph, at a root mean square error of 3 to 13 of 255 (`pytest -m slow tests/configs`
    repeats this).
"""

import dataclasses

from blip3o_jax import config
from blip3o_jax.demo import recipe as demo

IMAGE_SIZE = 64  # a multiple of 16


def get_config() -> dict[str, config.Config]:
    base = config.Config(
        model=demo.model(IMAGE_SIZE),
        data=config.DataConfig(batch_size=16, max_length=96, workers=0, max_bad_fraction=0.2),
        mesh=config.MeshConfig(data=-1, fsdp=1, strategy="dp", cpu_devices=demo.cpu_devices()),
        log_every=50,
        # Memorized images need no variety: the likeliest tokens, and no guidance.
        sampling=config.SamplingConfig(
            temperature=0.0, top_k=0, top_p=1.0, steps=20, guidance=1.0, batch_size=16
        ),
    )

    def stage(name: str, steps: int, rate: float, **changes: object) -> config.Config:
        return dataclasses.replace(
            base,
            stage=name,
            steps=steps,
            optimizer=config.OptimizerConfig(
                learning_rate=rate, end_learning_rate=rate / 50, warmup_fraction=0.05, b2=0.99
            ),
            checkpoint=config.CheckpointConfig(
                every=200, keep=1, init_from=changes.pop("init_from", ())
            ),
            **changes,
        )

    return {
        "autoencoder": stage(
            "autoencoder", 500, 3e-3, loss=config.LossConfig(latent_scale=0.01, latent_noise=0.05)
        ),
        "contrastive": stage("contrastive", 60, 1e-3, loss=config.LossConfig(dense=3.0)),
        "tokenizer": stage("tokenizer", 100, 1e-3, init_from=(("tokenizer", "contrastive"),)),
        "joint": stage(
            "joint",
            600,
            3e-3,
            trainable=("ar/.*", "connector/.*", "dit/.*"),
            loss=config.LossConfig(ce_chunk=64, condition_dropout=0.05, flow_samples=4),
            init_from=(("tokenizer", "tokenizer"), ("vae", "autoencoder")),
        ),
    }
