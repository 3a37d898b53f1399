"""PyTorch's side of a comparison is what PyTorch's loaders make of the files, whatever this package
reads there."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from blip3o_jax.config import UserError
from blip3o_jax.convert import tensor_files, weight_files
from blip3o_jax.convert.source import open_source
from blip3o_jax.convert.tables import PUBLISHED_PARTS
from blip3o_jax.convert.torch_files import load_torch
from tests.convert import published
from tests.convert.published import HEAD, PREFIXES, Options, check_equal

OPTIONS = [
    Options(
        31,
        shards=3,
        latent_connector=True,
        feature_connector=True,
        noise_connector=True,
        mixed=True,
    ),
    Options(32, tied=False, flat_decoder=True, nested_encoder=True, spare_rows=2),
]


@pytest.fixture(scope="module", params=OPTIONS, ids=str)
def made(request, tmp_path_factory):
    return published.write(tmp_path_factory.mktemp("published"), request.param)


def loaded(source, made, tensors=None):
    """Compare the stock modules with the tensors that were written, of all parts there are."""
    parts = [part for part in PREFIXES if source.tensors.get(part)]
    for part, module in load_torch(source, parts).named_children():
        want = {
            key: (tensors or made.tensors).get(PREFIXES[part] + key) for key in module.state_dict()
        }
        if part == "tokenizer":
            want = {key: spelled(made, key) for key in want}
        if part == "ar" and want[HEAD] is None:
            want[HEAD] = want[published.EMBEDDINGS]
        check_equal(module.state_dict(), {key: value.float() for key, value in want.items()})
    return parts


def spelled(made, key):
    """Return a tensor of the vision tokenizer, by any of the names that it is published with."""
    side, _, rest = key.partition(".")
    rest = rest.removeprefix("vision_model.")
    names = (key, f"{side}.{rest}", f"{side}.vision_model.{rest}")
    return next(
        made.tensors[PREFIXES["tokenizer"] + n]
        for n in names
        if PREFIXES["tokenizer"] + n in made.tensors
    )


def test_a_whole_directory(made, monkeypatch):
    """Find a difference also where this package reads every tensor wrong."""
    source = open_source(made.directory, **made.arguments)
    wrong = {
        part: {
            key: dataclasses.replace(t, read=lambda t=t: np.zeros(t.shape, t.dtype))
            for key, t in tensors.items()
        }
        for part, tensors in source.tensors.items()
    }
    monkeypatch.setattr(tensor_files, "_reader", None)
    monkeypatch.setattr(weight_files, "_read_index", None)
    assert set(loaded(dataclasses.replace(source, tensors=wrong), made)) >= set(PUBLISHED_PARTS)


def test_torch_files_and_wrappers(made, tmp_path):
    """Read torch.save's files; names of a model that was compiled, and of one that was trained
    on many devices.
    """
    shutil.copytree(
        made.directory,
        tmp_path,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.safetensors*"),
    )
    for wrap in ("", "module._orig_mod."):
        published.save(
            tmp_path,
            "pytorch_model",
            {wrap + k: x for k, x in made.tensors.items()},
            torch_files=True,
        )
        source = open_source(tmp_path, **made.arguments)
        loaded(source, made)
        assert any("is read as model." in note for note in source.notes) == bool(wrap)


@pytest.mark.parametrize("wrap", ["", "module._orig_mod."])
def test_the_directories_of_the_parts(made, tmp_path, wrap):
    """Load a part's own directory by its stock class, or with wrapped names by its files, over
    which the whole directory's tensors are laid; TA-Tok by torch.load.
    """
    options = Options(99, shards=2, qk_norm=made.model.dit.qk_norm is not None)
    other = published.write_diffusion(tmp_path / "sana", made.model, options)
    for part, folder in (("dit", "transformer"), ("vae", "vae")) if wrap else ():
        for file in (tmp_path / "sana" / folder).glob("*.safetensors*"):
            file.unlink()
        values = {
            wrap + k.removeprefix(PREFIXES[part]): x
            for k, x in other.items()
            if k.startswith(PREFIXES[part])
        }
        shards = 2 if part == "dit" else 1
        published.save(tmp_path / "sana" / folder, "diffusion_pytorch_model", values, shards)
    caption = PREFIXES["dit"] + "caption_projection."
    tower = {
        k.removeprefix(PREFIXES["tokenizer"]): x
        for k, x in made.tensors.items()
        if k.startswith(PREFIXES["tokenizer"])
    }
    torch.save({"model": {"args": {}, "sd": tower}}, tmp_path / "ta_tok.pth")
    own = ("model.sana", PREFIXES["tokenizer"])
    kept = {k: x for k, x in made.tensors.items() if not k.startswith(own) or k.startswith(caption)}
    shutil.copytree(
        made.directory, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*")
    )
    published.save(tmp_path / "model", "model", kept)
    arguments = made.arguments | {"diffusion": tmp_path / "sana", "ta_tok": tmp_path / "ta_tok.pth"}
    source = open_source(tmp_path / "model", **arguments)
    loaded(source, made, made.tensors | other | kept)


def test_what_pytorch_does_not_load(made, tmp_path):
    ar = PREFIXES["dit"] + "proj_out.bias"
    shutil.copytree(made.directory, tmp_path / "model")
    source = open_source(tmp_path / "model", **made.arguments)
    for found in (tmp_path / "model").glob("*.safetensors*"):
        found.unlink()
    published.save(tmp_path / "model", "model", {k: x for k, x in made.tensors.items() if k != ar})
    with pytest.raises(UserError, match=r"PyTorch finds no model\.sana\.proj_out\.bias there"):
        load_torch(source, ["dit"])
    (tmp_path / "model" / "model.safetensors").unlink()
    for part, words in (
        ("ar", "PyTorch's loader refuses it"),
        ("dit", "transformers finds no weights"),
    ):
        with pytest.raises(UserError, match=words) as error:
            load_torch(source, [part])
        assert "\n" not in str(error.value)


def test_a_stale_index_next_to_the_single_file(made, tmp_path):
    """Read the single file, as PyTorch does."""
    shutil.copytree(
        made.directory, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*")
    )
    published.save(tmp_path / "model", "model", {k: x * 0.5 for k, x in made.tensors.items()}, 2)
    published.save(tmp_path / "model", "model", made.tensors)
    source = open_source(tmp_path / "model", **made.arguments)
    key = "model.norm.weight"
    np.testing.assert_array_equal(
        source.tensors["ar"][key].read().astype(np.float32), made.tensors[key].float()
    )
    assert any("model.safetensors.index.json is not" in note for note in source.notes)
    loaded(source, made)
    # A file that lacks a tensor is reported with the other file of its directory.
    published.save(tmp_path / "model", "model", {k: x for k, x in made.tensors.items() if k != key})
    with pytest.raises(
        UserError, match=r"model\.norm\.weight is missing .*index\.json is not: delete"
    ):
        open_source(tmp_path / "model", **made.arguments)


def test_variants_of_the_diffusers_directory(made, tmp_path):
    """Read a directory as the bfloat16 SANA is published: of one part default shards and a bf16
    file, of the other that alone.
    """
    sana = tmp_path / "sana"
    published.write_diffusion(sana, made.model, None)
    parts = {}
    for part, folder in (("dit", "transformer"), ("vae", "vae")):
        parts[folder] = {
            k.removeprefix(PREFIXES[part]): x
            for k, x in made.tensors.items()
            if k.startswith(PREFIXES[part])
        }
        published.save(sana / folder, "diffusion_pytorch_model.bf16", parts[folder])
    doubled = {key: 2 * x.float() for key, x in parts["transformer"].items()}
    published.save(sana / "transformer", "diffusion_pytorch_model", doubled, 2)
    shutil.copytree(
        made.directory, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*")
    )
    kept = {
        k: x
        for k, x in made.tensors.items()
        if not k.startswith((PREFIXES["dit"], PREFIXES["vae"]))
    }
    published.save(tmp_path / "model", "model", kept)
    arguments = made.arguments | {"diffusion": sana}
    source = open_source(tmp_path / "model", **arguments)
    dit = {PREFIXES["dit"] + key: x for key, x in doubled.items()}
    loaded(source, made, made.tensors | dit)
    assert any("bf16 is the only one" in note for note in source.notes)
    assert any("--variant=bf16 reads" in note for note in source.notes)
    source = open_source(tmp_path / "model", **arguments, variant="bf16")
    loaded(source, made)
    assert any("there is no bf16 variant in" in note for note in source.notes), (
        "the whole directory's default one is read"
    )
    with pytest.raises(UserError, match=r"^--variant=fp32: .* have weights of that variant$"):
        open_source(tmp_path / "model", **arguments, variant="fp32")


def test_a_prefix_that_is_not_known(made, tmp_path):
    shutil.copytree(
        made.directory,
        tmp_path,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.safetensors*"),
    )
    published.save(tmp_path, "model", {f"ema.net.{k}": x for k, x in made.tensors.items()})
    with pytest.raises(
        UserError,
        match=r"the files name it ema\.net\.model\.\S+: save .* without the prefix ema\.net\.$",
    ):
        open_source(tmp_path, **made.arguments)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x/y"}))
    with pytest.raises(UserError, match="merge it first"):
        open_source(tmp_path, **made.arguments)
