"""Compare with the stock classes' own logits, and with the parts of a contrastive checkpoint; all
tiny and random."""

import string

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from PIL import Image

from blip3o_jax.blip3o import Blip3o, scale_pixels
from blip3o_jax.config import UserError, to_dict
from blip3o_jax.data.sequence import caption_row
from blip3o_jax.data.sources import open_mixture
from blip3o_jax.files import write_json
from blip3o_jax.rl.rewards import clip
from blip3o_jax.train.checkpoint import Checkpoints
from blip3o_jax.train.state import create_state, plan_state
from blip3o_jax.train.vocabulary import with_vocabulary
from tests import tiny

PROMPTS = ["a cat", "two dogs on a hill", "a cat"]
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION = TEXT | {"image_size": 16, "patch_size": 8}


def write_clip(path) -> None:
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    vocabulary = {
        token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])
    }
    text = TEXT | {
        "vocab_size": len(vocabulary),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "max_position_embeddings": 24,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(path)
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(path)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(path)


def write_siglip(path) -> None:
    letters = {
        token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", " ", *string.ascii_lowercase])
    }
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids"],
    )
    text = TEXT | {"vocab_size": len(letters), "max_position_embeddings": 24, "projection_size": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    transformers.SiglipModel(config).save_pretrained(path)
    fast.save_pretrained(path)
    transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)


@pytest.fixture
def images_BHWC(rng):
    return rng.integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("write", "padding"),
    [(write_clip, {"padding": True}), (write_siglip, {"padding": "max_length", "max_length": 24})],
)
def test_scores_are_the_cosines_behind_the_stock_models_logits(
    write, padding, tmp_path, images_BHWC
):
    torch.manual_seed(0)
    write(tmp_path)
    scores = clip.create(path=str(tmp_path), batch="2")(images_BHWC, PROMPTS, [{}] * 3)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path)(
        images=[Image.fromarray(image) for image in images_BHWC], return_tensors="pt"
    )
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        PROMPTS, return_tensors="pt", **padding
    )
    with torch.no_grad():
        logits = model(**pixels, **tokens).logits_per_image.diagonal()
        cosine = (logits - getattr(model, "logit_bias", 0)) / model.logit_scale.exp()
    assert scores.total_B.dtype == np.float32 and scores.parts == {}
    np.testing.assert_allclose(scores.total_B, cosine.numpy(), atol=1e-6)
    assert np.ptp(cosine.numpy()) > 1e-3


def test_prompts_that_the_library_would_cut_are_refused(tmp_path):
    write_clip(tmp_path)
    reward = clip.create(path=str(tmp_path))
    reward.check("a" * 22, {})
    with pytest.raises(UserError, match="is 25 tokens, the encoder takes 24: shorten it"):
        reward.check("a" * 23, {})


@pytest.fixture(scope="module")
def contrastive(tmp_path_factory):
    """Return (workdir, configuration, vocabulary, state) of a run of stage contrastive that was not
    trained."""
    workdir = tmp_path_factory.mktemp("contrastive")
    cfg = tiny.run_config(tiny.data(), stage="contrastive")
    cfg, vocabulary = with_vocabulary(cfg, open_mixture(cfg.data), workdir)
    state = create_state(cfg, plan_state(cfg, tiny.strategy()))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.open(cfg, vocabulary.tokenizer)
    checkpoints.save(6, state, {"next_example": 0}, 1.0)
    checkpoints.close()
    return workdir, cfg, vocabulary


def test_scores_of_the_projects_own_encoder(contrastive, images_BHWC):
    workdir, cfg, vocabulary = contrastive
    scores = clip.create(path=str(workdir), batch="2")(images_BHWC, PROMPTS, [{}] * 3)
    model = Blip3o(
        cfg.model, ("tokenizer", "text_tower"), seed=cfg.seed
    )  # what the run started from
    shown = np.stack(
        [
            np.array(Image.fromarray(x).resize((16, 16), Image.Resampling.BICUBIC))
            for x in images_BHWC
        ]
    )
    rows = [caption_row(vocabulary, prompt, cfg.data.max_length) for prompt in PROMPTS]
    ids_BL, mask_BL = (np.stack([row[name] for row in rows]) for name in ("text_ids", "text_mask"))
    embed = nnx.jit(
        lambda m, *batch: (
            m.tokenizer.encoder(scale_pixels(batch[0])).pooled_BD,
            m.text_tower(*batch[1:]),
        )
    )
    x_BD, y_BD = (np.asarray(x, np.float64) for x in embed(model, shown, ids_BL, mask_BL))
    cosine = (x_BD * y_BD).sum(1) / np.linalg.norm(x_BD, axis=1) / np.linalg.norm(y_BD, axis=1)
    np.testing.assert_allclose(
        scores.total_B, cosine, atol=2e-6
    )  # float32, another order of summation
    assert np.ptp(cosine) > 1e-3


def test_a_prompt_longer_than_the_rows_is_refused(contrastive):
    reward = clip.create(path=str(contrastive[0]))
    with pytest.raises(
        UserError,
        match=r"reward clip: prompt 'xyzxyz.* is 601 tokens, the encoder takes 32: shorten it",
    ):
        reward.check("xyz" * 200, {})


def test_other_directories_are_refused(tmp_path, contrastive):
    with pytest.raises(UserError, match="reward clip: set its option path"):
        clip.create()
    with pytest.raises(UserError, match="does not exist"):
        clip.create(path=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="is not a checkpoint"):
        clip.create(path=str(tmp_path))
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match="cannot be read: "):
        clip.create(path=str(tmp_path))
    (tmp_path / "joint" / "6" / "state").mkdir(parents=True)
    write_json(tmp_path / "joint" / "config.json", to_dict(tiny.run_config()))
    with pytest.raises(
        UserError, match="was written by stage 'joint'; give a run of stage 'contrastive'"
    ):
        clip.create(path=str(tmp_path / "joint"))
