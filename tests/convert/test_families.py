"""Language models and diffusion heads of other families, from their published layouts and back."""

import dataclasses
import json

import pytest
import torch
from diffusers import SD3Transformer2DModel
from transformers import Qwen2ForCausalLM

from blip3o_jax import config
from blip3o_jax.convert import conversions, torch_files
from blip3o_jax.convert.exporter import export_weights
from blip3o_jax.convert.importer import import_weights
from blip3o_jax.convert.source import open_source
from blip3o_jax.train.checkpoint import read_config
from tests.convert import published
from tests.convert.published import Options, check_equal, planned_once  # noqa: F401

pytestmark = pytest.mark.usefixtures("planned_once")


def test_a_family_without_a_conversion_is_refused_by_its_part():
    with pytest.raises(config.UserError, match="part 'text_tower' is of a family without a conv"):
        conversions.conversion_of("text_tower", config.ModelConfig())


def test_tar_with_an_mmdit_comes_in_and_goes_out_as_the_stock_classes_have_it(tmp_path):
    """Convert Tar: a directory of `Qwen2ForCausalLM` whose tokenizer has the image tokens, and
    ta_tok.
    """
    options = Options(3, "float32", tied=True, named_tokens=True)
    tar = tmp_path / "tar"
    tar.mkdir()
    rows = published.write_text(tar, options) + 5 + published.CODES
    cfg = published.model(options, rows)
    ar = config.Qwen2Config(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    dit = config.MMDiTConfig(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
        joint_attention_dim=10,
        pooled_projection_dim=10,
        pos_embed_max_size=6,
        sample_size=cfg.latent_size,
    )
    cfg = dataclasses.replace(cfg, ar=ar, dit=dit)
    weights = {part: published.random_part(part, cfg, options) for part in ("ar", "tokenizer")}
    published.save(tar, "model", weights["ar"])
    published.write_json(tar / "config.json", conversions.stock_config("ar", cfg))
    published.save(tmp_path, "ta_tok", weights["tokenizer"])
    published.write_json(tmp_path / "sizes.json", published.ta_tok_sizes(cfg))
    diffusion = tmp_path / "sd3"
    published.write_diffusion(diffusion, cfg, options)
    # The table of positions is computed here: the file has the stock class's own.
    stock = SD3Transformer2DModel.from_config(diffusion / "transformer")
    state = published.random_part("dit", cfg, options)
    state["pos_embed.pos_embed"] = stock.state_dict()["pos_embed.pos_embed"]
    published.save(diffusion / "transformer", "diffusion_pytorch_model", state, options.shards)

    source = open_source(
        tar,
        diffusion=diffusion,
        ta_tok=tmp_path / "ta_tok.safetensors",
        ta_tok_config=tmp_path / "sizes.json",
        initialise=("connector",),
    )
    found = torch_files.load_torch(source, ("ar", "dit"))
    check_equal(found.dit.state_dict(), state)
    import_weights(source, tmp_path / "checkpoint")
    model = read_config(tmp_path / "checkpoint").model
    assert (type(model.ar), type(model.dit)) == (config.Qwen2Config, config.MMDiTConfig)
    assert model.ar == dataclasses.replace(ar, param_dtype="float32")

    out = tmp_path / "out"
    export_weights(tmp_path / "checkpoint", out, parts=("ar", "dit", "ta_tok"))
    values = json.loads((out / "ar" / "config.json").read_text())
    assert (values["architectures"], values["model_type"]) == (["Qwen2ForCausalLM"], "qwen2")
    for part, cls, want in (
        ("ar", Qwen2ForCausalLM, weights["ar"]),
        ("dit", SD3Transformer2DModel, state),
    ):
        loaded, info = cls.from_pretrained(out / part, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        got = loaded.state_dict()
        assert all(torch.equal(got[key], value) for key, value in want.items() if key in got)
        assert set(want) <= set(got)
    export_weights(tmp_path / "checkpoint", tmp_path / "whole")
    names = published.read(tmp_path / "whole")
    assert {f"model.mmdit.{key}" for key in state} == {k for k in names if ".mmdit." in k}
    values = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert values["model_type"] == "qwen2" and values["blip3o_jax"]["model"]["dit"]["model_type"]
    again = open_source(tmp_path / "whole")
    assert again.config.model.dit == model.dit and again.config.model.ar == model.ar
