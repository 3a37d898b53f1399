"""configs/edit.py takes a checkpoint as it is and adds both conditioning routes."""

import pathlib

from blip3o_jax.config import loader
from blip3o_jax.convert.tables import PUBLISHED_PARTS
from blip3o_jax.train import checkpoint
from blip3o_jax.train.freezing import stage_trainable
from blip3o_jax.train.stages import stage_parts
from tests.rl import runs

FILE = str(pathlib.Path(__file__).parents[2] / "configs/edit.py")


def test_both_reference_routes_with_all_parts_of_the_checkpoint():
    found = loader.load(f"{FILE}:{runs.started_from()}", {"model.editing.reference_slots": "2"})
    given = checkpoint.read_config(runs.started_from() / "checkpoints")
    editing = found.model.editing
    assert (editing.reference_slots, editing.latents, editing.latent_concat, editing.features) == (
        2,
        True,
        True,
        False,
    )
    assert found.model.tokenizer == given.model.tokenizer and found.data.max_length == 0
    assert [part for part, _ in found.checkpoint.init_from] == list(PUBLISHED_PARTS), (
        "the new connector is drawn"
    )
    assert stage_parts(found) == (*PUBLISHED_PARTS, "latent_connector")
    assert {"latent_connector/.*", "dit/patch_embed/.*", "dit/proj_out/.*"} < set(
        stage_trainable(found)
    )
