r"""Train image editing, reconstruction, understanding and text to image in one mixture, from an
instruction-tuned checkpoint.

Command:
    blip3o train --config=configs/edit.py:runs/instruct --workdir=runs/edit \
        --config.data.sources="[{'path': 'edits/*.tar', 'weight': 4}, \
            {'path': 'questions.jsonl'}, {'path': 'captions/*.tar'}]"
    blip3o edit --checkpoint=runs/edit --image=photo.png --instruction="make the sky green" \
        --out=edited
    The argument is the checkpoint, which provides model, vocabulary and text tokenizer. Reference
    images condition the model in both ways, the best variant of the paper. docs/data.md has the
    fields of each task's records.
Hardware: as configs/instruct.py, with latents of twice the width in the DiT (`--config.mesh.*`).
Duration: unknown; the published tuning has about 7000 steps at batch 128.
Expected: depends on the data. Sizes of 1.7B have not been run here.

Rows have room for the mixture's longest examples (data.max_length=0): an instruction, reference
images of 729 tokens each and the target image. With `--config.data.pack=2` a short example shares
its row with a long one. More references: `--config.model.editing.reference_slots=2`.
"""

import dataclasses

from blip3o_jax import config
from blip3o_jax.train.initialize import from_checkpoint


def get_config(path: str) -> config.Config:
    base = from_checkpoint(path, trained=("ar", "connector", "dit"))
    editing = dataclasses.replace(
        base.model.editing,
        reference_slots=max(1, base.model.editing.reference_slots),
        latents=True,
        latent_concat=True,
    )
    return dataclasses.replace(
        base,
        steps=7_000,
        log_every=50,
        model=dataclasses.replace(base.model, editing=editing),
        data=dataclasses.replace(base.data, batch_size=128, workers=16, max_length=0),
        optimizer=config.OptimizerConfig(learning_rate=5e-5, end_learning_rate=1e-5),
        checkpoint=dataclasses.replace(base.checkpoint, every=500),
    )
