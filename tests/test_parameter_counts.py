"""Compare parameter counts of the published sizes with the stock classes on torch's meta device:
nothing is allocated."""

import dataclasses
import pathlib

import diffusers
import pytest
import torch
import transformers

from blip3o_jax import config, parameter_counts
from blip3o_jax.config import loader
from blip3o_jax.text.tokenizers import train_sentencepiece
from blip3o_jax.train.vocabulary import expected_vocabulary
from tests import tiny

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def size(module) -> int:
    return sum(p.numel() for p in module.parameters())


def linear(d_in: int, d_out: int) -> int:
    return (d_in + 1) * d_out


@pytest.fixture(scope="module")
def stock() -> dict[str, int]:
    """Return the parameters of each part of the 1.7B + 1.6B model, from the classes' own published
    settings."""
    qwen3 = transformers.Qwen3Config(
        vocab_size=217210,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    siglip = transformers.SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    decoder = transformers.Siglip2VisionConfig(
        hidden_size=1152,
        intermediate_size=3072,
        num_hidden_layers=3,
        num_attention_heads=12,
        num_channels=1536,  # patch size 1: a "pixel" is a code
        num_patches=256,
        patch_size=1,
    )
    sana = {"caption_channels": 2304, "num_layers": 20, "qk_norm": "rms_norm_across_heads"}
    autoencoder = {
        "latent_channels": 32,
        "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
        "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
        "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
        "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
    }
    with torch.device("meta"):
        # Around encoder and decoder: the task layers (one linear map, then two), the maps into and
        # out of the codebook, the codes and SimVQ's projection of them.
        code, codebook = 1536, 65536
        between = linear(1152, 1152) + 2 * linear(1152, 1152)
        between += linear(1152, code) + linear(code, code) + codebook * code + linear(code, code)
        return {
            "ar": size(transformers.Qwen3ForCausalLM(qwen3)),
            "tokenizer": size(transformers.SiglipVisionModel(siglip))
            + size(transformers.Siglip2VisionModel(decoder))
            + between,
            "dit": size(diffusers.SanaTransformer2DModel(**sana)),
            "vae": size(diffusers.AutoencoderDC(**autoencoder)),
            "connector": linear(2048, 2304) + linear(2304, 2304) + 2304,
        }


def test_the_published_sizes(stock):
    counts = parameter_counts.count_parameters(loader.load(f"{CONFIGS}/pretrain.py:1.7b"))
    assert {part: row["parameters"] for part, row in counts.items()} == stock
    # 217600 rows are stored for 217210 ids; the head is tied, so that they are there once.
    assert counts["ar"]["padding"] == (217600 - 217210) * 2048
    assert (
        counts["ar"]["trainable"] == stock["ar"]
        and counts["connector"]["trainable"] == stock["connector"]
    )
    assert counts["tokenizer"]["trainable"] == counts["vae"]["trainable"] == 0
    # Of the DiT only the caption projection and its norm.
    assert counts["dit"]["trainable"] == linear(2304, 2240) + linear(2240, 2240) + 2240


def test_an_untied_head_is_counted_twice_with_its_padding():
    tied = tiny.run_config(model={"ar": {"vocab_size": 357}})
    untied = tiny.run_config(model={"ar": {"vocab_size": 357, "tie_word_embeddings": False}})
    one, two = (parameter_counts.count_parameters(cfg)["ar"] for cfg in (tied, untied))
    assert two["parameters"] - one["parameters"] == 357 * 32
    assert (one["padding"], two["padding"]) == (3 * 32, 2 * 3 * 32)


@pytest.mark.parametrize("stage", config.STAGE_NAMES)
def test_the_table_is_printed_for_every_stage(stage, capsys):
    cfg = tiny.run_config(stage=stage)
    parameter_counts.print_table(cfg)
    out = capsys.readouterr().out
    counts = parameter_counts.count_parameters(cfg)
    for part, row in counts.items():
        assert part in out and f"{row['parameters']:,}" in out
    assert f"{sum(row['parameters'] for row in counts.values()):,}" in out


def test_the_vocabulary_is_counted_by_its_tokenizer_or_said_to_be_assumed(tmp_path):
    """Assume a trained tokenizer's largest size until the captions are read."""
    cfg = tiny.run_config(model={"text": {"kind": "sentencepiece", "train_size": 320}})
    limit, note = expected_vocabulary(cfg)
    assert "assumed" in note and limit.model.ar.vocab_size == 320 + 2 + 3 + 32, note
    tokenizer = tmp_path / "text.model"
    train_sentencepiece(
        iter(["a red circle", "a blue square"] * 9), tokenizer, 300, cfg.model.template
    )
    text = dataclasses.replace(cfg.model.text, path=str(tokenizer))
    given = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, text=text))
    known, note = expected_vocabulary(given)
    size = known.model.ar.vocab_size
    assert size < limit.model.ar.vocab_size
    assert f"{size:,} ids, by the tokenizer {tokenizer}" in note
