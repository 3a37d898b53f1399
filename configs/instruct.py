r"""Instruction-tune a pretrained model at the published sizes: the joint stage on a small, clean
mixture.

Command:
    blip3o train --config=configs/instruct.py:1.7b --workdir=runs/instruct \
        --config.data.sources="[{'path': 'blip3o_60k/*.tar'}, \
            {'path': 'sharegpt_4o_image/*.tar'}]" \
        --config.model.text.path=qwen3/tokenizer.json \
        --config.checkpoint.init_from="[('ar', 'runs/pretrain'), ('connector', 'runs/pretrain'), \
            ('dit', 'runs/pretrain'), ('vae', 'runs/pretrain'), ('tokenizer', 'runs/pretrain')]"
    The argument is the size, as for pretrain.py: 0.6b, 1.7b (the default), 4b or 8b. The recipe's
    data are BLIP3o-60k and ShareGPT-4o-Image, which you download yourself. With 1.7b:understand
    rows have a slot for a reference image, so that questions about images can be among the sources
    (docs/editing.md).
Hardware: as for pretrain.py. Published: not stated for this stage.
Duration: unknown; 7,000 steps of 128 examples are 1/192 of the examples of pretraining.
Expected: the nearest published figure is GenEval 0.821, where the reinforcement learning began (it
    ended at 0.902).
"""

import dataclasses
import pathlib

from blip3o_jax import config
from blip3o_jax.config import loader


def get_config(argument: str = "1.7b") -> config.Config:
    size, _, more = argument.partition(":")
    config.check_choice("tasks", more, ("", "understand"))
    pretrain = loader.load(f"{pathlib.Path(__file__).with_name('pretrain.py')}:{size}")
    editing = dataclasses.replace(pretrain.model.editing, reference_slots=1 if more else 0)
    return dataclasses.replace(
        pretrain,
        steps=7_000,
        log_every=10,
        model=dataclasses.replace(pretrain.model, editing=editing),
        data=dataclasses.replace(pretrain.data, batch_size=128),
        optimizer=dataclasses.replace(pretrain.optimizer, learning_rate=5e-5),
        checkpoint=config.CheckpointConfig(every=500, keep=3),
    )
