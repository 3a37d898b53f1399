r"""Pretrain the whole model at the published sizes: next-token loss on text and image tokens, flow
matching on latents.

Command:
    blip3o convert import --source=Qwen3-1.7B --diffusion=SANA1.5_1.6B_1024px_diffusers \
        --ta_tok=ta_tok.pth --initialise=connector,image_embeddings --out=start
    blip3o train --config=configs/pretrain.py:1.7b --workdir=runs/pretrain \
        --config.data.path='captions/*.tar' --config.model.text.path=start/text \
        --config.checkpoint.init_from="[('ar', 'start'), ('tokenizer', 'start'), \
            ('dit', 'start'), ('vae', 'start')]"
    The argument is the size of the AR: 0.6b, 1.7b (the default), 4b or 8b; +0.6b or +4.8b after it
    sets the size of the diffusion head, by default 1.6b as published (config/presets.py). You
    choose the other settings: the published recipe starts every part but the connector from trained
    weights. Data: webdataset shards of key.jpg + key.txt; the recipe used 27 M long and 5 M short
    captions (two `data.sources`).
Hardware: a TPU pod; the mesh shards parameters and batch over all devices (`--config.mesh.*`).
    Published: 32 H200.
Duration: unknown. The model is built and its parameter table checked, but it has not been trained
    to the end here.
Expected: the paper has no score after pretraining alone. After instruction tuning and reinforcement
    learning it reports GenEval 0.91 (single 0.99, two 0.95, counting 0.88, colours 0.90, position
    0.92, colour attribution 0.79).

Where the sources differ or do not say:
    learning rate    5e-5 is the released script's; the project page says 1e-4
                     (--config.optimizer.learning_rate=1e-4).
    Adam betas       not stated; (0.9, 0.95) here.
    frozen encoders  tokenizer and autoencoder have bfloat16 weights, since nothing updates them.
                     The DiT is float32: its caption layers are trained. The encoders run at every
                     step; with `--config.data.cache_dir=DIR` they run once for each image, which
                     saves a fifth of the work over several epochs.
    row length       not stated; chosen by the captions here (data.max_length=0): rows of 1,152
                     tokens have room for captions of 350.
    recomputation    the reference recomputes every layer in the backward pass. Here the results of
                     matrix products and, on TPUs, of attention are kept (5 GB for an example of
                     2048 tokens); to save memory, --config.model.ar.remat=full and
                     --config.model.dit.remat=full.
"""

import dataclasses

from blip3o_jax import config


def get_config(size: str = "1.7b") -> config.Config:
    ar, dit = config.model_sizes(size)
    return config.Config(
        stage="joint",
        steps=336_000,
        log_every=50,
        model=config.ModelConfig(
            ar=dataclasses.replace(ar, remat="dots"),
            tokenizer=config.TaTokConfig(
                encoder=config.SiglipVisionConfig(param_dtype="bfloat16"), param_dtype="bfloat16"
            ),
            dit=dataclasses.replace(dit, remat="dots"),
            vae=config.DcAeConfig(param_dtype="bfloat16"),
        ),
        data=config.DataConfig(batch_size=512, max_length=0, workers=16),
        optimizer=config.OptimizerConfig(
            learning_rate=5e-5,
            end_learning_rate=1e-5,
            warmup_fraction=0.01,
            weight_decay=0.0,
            b1=0.9,
            b2=0.95,
        ),
        checkpoint=config.CheckpointConfig(every=2000, keep=3),
    )
