r"""Continue joint training from a checkpoint with all its parts: an imported one (`blip3o convert
import`), or one trained here.

Command:
    blip3o convert import --source=BLIP3o-NEXT --diffusion=SANA --out=published
    blip3o train --config=configs/finetune.py:published --workdir=runs/finetune \
        --config.data.path='captions/*.tar'
    The argument is the checkpoint, which provides model, vocabulary and text tokenizer. To publish
    the result:
    blip3o convert export --source=runs/finetune --out=finetuned
Hardware: as configs/instruct.py for the published sizes; the mesh is fsdp over all devices
    (`--config.mesh.*`).
Duration: unknown; 7000 steps at batch 128 are the published instruction tuning.
Expected: depends on the data. Steps, batch and learning rate are those of configs/instruct.py.

Trained parts (AR, connector, DiT) are float32 whatever the checkpoint's dtype, since steps of 5e-5
vanish in bfloat16; frozen ones (tokenizer, autoencoder) keep theirs. Export with --dtype=bfloat16
to get the published size back.
"""

import dataclasses

from blip3o_jax import config
from blip3o_jax.train.initialize import from_checkpoint


def get_config(path: str) -> config.Config:
    base = from_checkpoint(path, trained=("ar", "connector", "dit"))
    return dataclasses.replace(
        base,
        steps=7_000,
        log_every=50,
        data=dataclasses.replace(base.data, batch_size=128, max_length=0, workers=16),
        optimizer=config.OptimizerConfig(learning_rate=5e-5, end_learning_rate=1e-5),
        checkpoint=dataclasses.replace(base.checkpoint, every=500),
    )
