import pytest

from blip3o_jax import config
from blip3o_jax.demo import recipe as demo
from blip3o_jax.train.stages import STAGES

TASKS = {"edits": "edits.tar", "questions": "questions.tar"}
FULL, FAST = (demo.recipe("data", "cache", TASKS, fast=fast) for fast in (False, True))


@pytest.mark.parametrize("recipe", (FULL, FAST))
def test_stages_come_after_what_they_start_from(recipe):
    names = list(recipe)
    assert names == ["autoencoder", "contrastive", "tokenizer", "joint"]
    for position, (name, stage) in enumerate(recipe.items()):
        assert stage.stage == name
        for part, source in stage.checkpoint.init_from:
            assert source in names[:position]
            assert part in STAGES[name].parts and part in STAGES[source].parts
    # Nothing the joint stage keeps frozen is left at its random start.
    assert {part for part, _ in recipe["joint"].checkpoint.init_from} == {"tokenizer", "vae"}


@pytest.mark.parametrize("recipe", (FULL, FAST))
def test_every_stage_survives_the_way_into_a_checkpoint(recipe):
    for stage in recipe.values():
        assert config.from_dict(config.to_dict(stage)) == stage


def test_the_published_parts_are_all_there():
    """Check that sizes are reduced and no part and no kind of layer is left out."""
    model, published = demo.model(), config.ModelConfig()
    assert model.image_size == demo.IMAGE_SIZE
    assert set(model.vae.decoder_block_types) == set(published.vae.decoder_block_types)
    assert any(model.vae.decoder_qkv_multiscales) and model.dit.qk_norm == published.dit.qk_norm
    assert model.tokenizer.l2_normalized == published.tokenizer.l2_normalized
    assert model.tokenizer.num_tokens > 1 and model.latent_size > 1


def test_a_row_holds_prompt_and_image():
    for stage in FULL.values():
        assert stage.data.max_length >= 2 * stage.model.tokenizer.num_tokens


def test_the_joint_stage_learns_every_task():
    sources = FULL["joint"].data.sources
    assert [(s.path, s.task) for s in sources] == [
        ("data", ""),
        ("edits.tar", ""),
        ("questions.tar", ""),
        ("data", "reconstruct"),
    ]
    assert sum(s.weight for s in sources) == pytest.approx(1) and not FULL["joint"].data.path
    alone = demo.recipe("data", "cache")["joint"]
    assert (alone.data.path, alone.data.sources, alone.model.editing.reference_slots) == (
        "data",
        (),
        0,
    )


def test_fast_is_the_same_with_fewer_steps_and_its_layers_scanned():
    assert demo.model(unroll=False) != demo.model()
    for name in FULL:
        assert FAST[name].steps < FULL[name].steps / 10
        assert (FAST[name].loss, FAST[name].data) == (FULL[name].loss, FULL[name].data)
        assert (FAST[name].model, FULL[name].model) == (
            demo.model(unroll=False, references=True),
            demo.model(references=True),
        )
