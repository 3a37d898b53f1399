"""Write the checkpoint of a tiny run."""

import pathlib

import jax
import numpy as np

from blip3o_jax.data.sources import open_mixture
from blip3o_jax.train.checkpoint import Checkpoints
from blip3o_jax.train.state import create_state, plan_state
from blip3o_jax.train.vocabulary import with_vocabulary
from tests.tiny.configs import run_config
from tests.tiny.datasets import data
from tests.tiny.meshes import strategy


def write_checkpoint(workdir: pathlib.Path, **changes: object) -> None:
    """Write the files of a joint run over `data()` after 6 steps to `workdir`, with weights that
    were not trained. `changes` as in `run_config`.

    The weights are random: initial weights reveal too little, since the AR's logits are all alike
    and the DiT's last layer is near zero. Rows hold prompts of up to 68 tokens.
    """
    cfg = run_config(data(), data={"max_length": 72}, **changes)
    cfg, vocabulary = with_vocabulary(cfg, open_mixture(cfg.data), workdir)
    state = create_state(cfg, plan_state(cfg, strategy()))
    rng = np.random.default_rng(1)
    state["params"] = jax.tree.map(
        lambda x: jax.device_put(
            np.asarray(x) + rng.normal(0, 0.3, x.shape).astype(x.dtype), x.sharding
        ),
        state["params"],
    )
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.open(cfg, vocabulary.tokenizer)
    checkpoints.save(6, state, {"next_example": 0}, 1.0)
    checkpoints.close()
