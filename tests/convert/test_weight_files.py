"""Which of a directory's files are its weights, with the libraries' own loaders as the oracle."""

import itertools
import json
import pathlib

import diffusers
import pytest
import safetensors.torch
import torch
import transformers

from blip3o_jax.config import UserError
from blip3o_jax.convert import torch_model
from blip3o_jax.convert.weight_files import ORDER, find_weights, read_weights
from tests.convert import published


def qwen3():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=8, **sizes, **heads))


def sana():
    return torch_model.part("dit", published.model(published.Options()))


# Class, what makes one, a tensor to tell the files apart by.
LIBRARIES = {
    "transformers": (transformers.Qwen3ForCausalLM, qwen3, "model.norm.weight"),
    "diffusers": (diffusers.SanaTransformer2DModel, sana, "caption_norm.weight"),
}


def name_of(kind, variant):
    """Return the name that both libraries save under."""
    stem, suffix, index = kind
    pieces = [stem, suffix, "index", "json"] if index else [stem, suffix]
    return ".".join([*pieces[:-1], *([variant] if variant else []), pieces[-1]])


def write_all(directory, library, variants=("",)):
    """Write every file that the library may read, each with another value of one tensor: {(kind,
    variant): value}."""
    _, make, key = LIBRARIES[library]
    torch.manual_seed(0)
    module = make()
    module.save_config(directory) if library == "diffusers" else module.config.save_pretrained(
        directory
    )
    state = {name: x.clone() for name, x in module.state_dict().items() if name != "lm_head.weight"}
    values = {}
    for number, (kind, variant) in enumerate(itertools.product(ORDER[library], variants)):
        stem, suffix, index = kind
        tensors = state | {key: torch.full_like(state[key], number + 1.0)}
        target = directory / name_of(kind, variant)
        shard = f"{stem}{'.' * bool(variant)}{variant}-00001-of-00001.{suffix}"
        file = directory / shard if index else target
        if suffix == "bin":
            torch.save(tensors, file)
        else:
            safetensors.torch.save_file(tensors, file, {"format": "pt"})
        if index:
            places = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, shard)}
            target.write_text(json.dumps(places))
        values[kind, variant] = number + 1.0
    return values


def value_there(directory, library, variant=""):
    cls, _, key = LIBRARIES[library]
    module = cls.from_pretrained(directory, variant=variant or None, local_files_only=True)
    return module.state_dict()[key][0].item()


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_file_that_the_library_reads_is_read(tmp_path, library, recwarn):
    """Check it for every set of files in which a model may lie, single, in shards, by PyTorch or
    safetensors.
    """
    key = LIBRARIES[library][2]
    values = write_all(tmp_path, library)
    for count in range(1, len(values) + 1):
        for present in itertools.combinations(values, count):
            hidden = [tmp_path / name_of(*kind) for kind in values if kind not in present]
            for file in hidden:
                file.rename(f"{file}.hidden")
            tensors, found = read_weights(tmp_path, library)
            assert tensors[key].read()[0] == value_there(tmp_path, library), present
            assert len(found.notes) == count - 1 and all(
                str(found.file) in note for note in found.notes
            )
            for file in hidden:
                pathlib.Path(f"{file}.hidden").rename(file)


@pytest.mark.parametrize("library", LIBRARIES)
def test_variants(tmp_path, library, recwarn):
    """Read the default one unless --variant names another; a single other one is read, with a
    message.
    """
    key = LIBRARIES[library][2]
    values = write_all(tmp_path, library, ("", "bf16"))
    for variant in ("", "bf16"):
        tensors, found = read_weights(tmp_path, library, variant)
        assert tensors[key].read()[0] == value_there(tmp_path, library, variant)
        assert found.variant == variant
    notes = find_weights(tmp_path, library).notes
    assert any("--variant=bf16 reads" in note for note in notes)
    assert any(
        "there is no fp16 variant" in note for note in find_weights(tmp_path, library, "fp16").notes
    )
    for kind, variant in values:
        if not variant:
            (tmp_path / name_of(kind, "")).unlink()
    tensors, found = read_weights(tmp_path, library)
    assert found.variant == "bf16" and "bf16 is the only one" in found.notes[0]
    assert tensors[key].read()[0] == value_there(tmp_path, library, "bf16")
    (tmp_path / name_of(ORDER[library][0], "fp16")).write_text("{}")
    with pytest.raises(
        UserError, match=r"of the variants bf16, fp16 only: choose with --variant=bf16$"
    ):
        find_weights(tmp_path, library)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.fp16.safetensors", "fp16"),
        ("model.fp16.safetensors.index.json", "fp16"),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("diffusion_pytorch_model.safetensors.fp16.index.json", "fp16"),
        ("diffusion_pytorch_model.non_ema.bin", "non_ema"),
        ("model-00001-of-00002.safetensors", None),
        ("model.fp16-00001-of-00002.safetensors", None),
        ("model.safetensors.index.json.bak", None),
        ("tokenizer_model.safetensors", None),
    ],
)
def test_names(tmp_path, name, variant):
    (tmp_path / name).touch()
    found = find_weights(tmp_path)
    assert (found and found.variant) == variant


def test_the_file_that_config_json_names(tmp_path):
    """Read it before all others, as transformers does."""
    write_all(tmp_path, "transformers")
    key = "model.norm.weight"
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors") | {
        key: torch.full((8,), 9.0)
    }
    safetensors.torch.save_file(tensors, tmp_path / "other.safetensors", {"format": "pt"})
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"transformers_weights": "other.safetensors"}))
    assert read_weights(tmp_path)[0][key].read()[0] == value_there(tmp_path, "transformers") == 9
    for name, words in (
        ("../x.safetensors", "must name a safetensors file or index in its directory"),
        ("x.bin", "must name a safetensors"),
        ("gone.safetensors", "gone.safetensors is missing, which"),
    ):
        config.write_text(json.dumps(values | {"transformers_weights": name}))
        with pytest.raises(UserError, match=words):
            read_weights(tmp_path)


def refused(directory, *words):
    with pytest.raises(UserError) as error:
        read_weights(directory)
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def test_weights_that_were_not_fetched(tmp_path):
    """Refuse what clones without Git LFS and git-annex hold, in one file and as a shard."""
    lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    annex = "/annex/objects/SHA256E-s12345--4d7a.safetensors\n"
    single, shard = tmp_path / "model.safetensors", tmp_path / "model-00001-of-00001.safetensors"
    for text, words in ((lfs, "is a Git LFS pointer"), (annex, "is a git-annex pointer")):
        single.write_text(text)
        refused(tmp_path, f"{single} {words} and not the file itself: run git")
        single.rename(tmp_path / "pytorch_model.bin")
        refused(tmp_path, f"pytorch_model.bin {words}")
        (tmp_path / "pytorch_model.bin").unlink()
    single.symlink_to("../.git/annex/objects/gone")
    refused(
        tmp_path,
        f"{single} is a link to ../.git/annex/objects/gone, which does not exist",
        "git annex get",
    )
    single.unlink()
    shard.write_text(lfs)
    refused(
        tmp_path,
        f"holds {shard.name} (1 shards in all), but no index of them: copy the .index.json too",
    )
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": shard.name}}))
    refused(tmp_path, f"{shard} is a Git LFS pointer")
    shard.unlink()
    shard.symlink_to("gone")
    refused(tmp_path, f"{shard} is a link to gone, which does not exist")
    index.write_text(lfs)
    refused(tmp_path, f"{index} is a Git LFS pointer")


def test_shards_that_the_index_does_not_name(tmp_path):
    """Skip them, as PyTorch does, with a message; those of a variant are its own index's."""
    published.save(tmp_path, "model", {"a": torch.ones(1), "b": torch.ones(1)}, 2)
    assert read_weights(tmp_path)[1].notes == ()
    published.save(tmp_path, "model-00003-of-00003", {"c": torch.ones(1)})
    published.save(tmp_path, "model.fp16-00001-of-00001", {"c": torch.ones(1)})
    tensors, found = read_weights(tmp_path)
    assert set(tensors) == {"a", "b"}
    assert found.notes == (
        f"{found.file} lists nothing in model-00003-of-00003.safetensors (1 in all), "
        "which is not read",
    )


def test_an_adapter_is_no_model(tmp_path):
    """Refuse it: PyTorch would read the weights of the model that it names."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    refused(
        tmp_path, "adapter_config.json makes", "merge it first", "or delete adapter_config.json"
    )
