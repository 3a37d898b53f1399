"""What can be wrong with a source or a target: one line that names file and tensor, and nothing
left behind.
"""

import contextlib
import errno
import gc
import json
import logging
import os
import pathlib
import resource
import shutil
import types

import numpy as np
import pytest
import torch

from blip3o_jax import checksums
from blip3o_jax.config import UserError
from blip3o_jax.convert import directory as directory_module
from blip3o_jax.convert import importer
from blip3o_jax.convert.exporter import export_weights
from blip3o_jax.convert.importer import import_weights
from blip3o_jax.convert.source import open_source
from tests.convert import published
from tests.convert.published import EMBEDDINGS, HEAD, Options, planned_once  # noqa: F401

pytestmark = pytest.mark.usefixtures("planned_once")

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
TOWER = "model.vision_tower.vision_tower."


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return published.write(
        tmp_path_factory.mktemp("good"), Options(21, stored_head=True, shards=3, vae="f2")
    )


@pytest.fixture(scope="module")
def imported(good, tmp_path_factory, planned_once):  # noqa: F811
    """Return (source, its checkpoint)."""
    source = open_source(good.directory, **good.arguments)
    root = tmp_path_factory.mktemp("imported") / "checkpoint"
    import_weights(source, root)
    return source, root


@pytest.fixture
def copy(good, tmp_path):
    """Return the published directory, to be spoilt, and what opens it."""
    shutil.copytree(good.directory, tmp_path / "model")
    return types.SimpleNamespace(
        path=tmp_path / "model",
        tensors=dict(good.tensors),
        model=good.model,
        arguments=good.arguments,
    )


def save_again(copy):
    for name in SHARDS:
        (copy.path / name).unlink()
    published.save(copy.path, "model", copy.tensors, 3)


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del values[key]
        else:
            values[key] = value
    published.write_json(path, values)


def refused(copy, *words, **changes):
    """Return the error's one line, which has all of `words`."""
    with pytest.raises(UserError) as error:
        open_source(copy.path, **copy.arguments | changes)
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def test_the_whole_directory_is_fine(copy):
    assert not open_source(copy.path, **copy.arguments).initialise


def test_a_shard_is_missing(copy):
    (copy.path / SHARDS[1]).unlink()
    index = json.loads((copy.path / "model.safetensors.index.json").read_text())["weight_map"]
    key = next(key for key, name in index.items() if name == SHARDS[1])
    refused(copy, f"{copy.path / SHARDS[1]} is missing", f"such as {key}")


@pytest.mark.parametrize(
    ("keep", "words"),
    [(50, ("ends within its header (50 bytes)",)), (-10, ("is cut off: ", "ends at byte"))],
)
def test_a_file_is_cut_off(copy, keep, words):
    file = copy.path / SHARDS[2]
    file.write_bytes(file.read_bytes()[:keep])
    refused(copy, str(file), *words)


KEYS = [
    "model.layers.1.self_attn.q_norm.weight",
    "model.norm.weight",
    f"{TOWER}decoder.vision_model.head.probe",
    f"{TOWER}bottleneck.regularizer.embedding.weight",
    "model.diffusion_connector.3.weight",
    "model.sana.scale_shift_table",
    "model.sana_vae.decoder.norm_out.bias",
]


@pytest.mark.parametrize("key", KEYS)
def test_a_tensor_is_missing(copy, key):
    del copy.tensors[key]
    save_again(copy)
    refused(copy, str(copy.path), f"{key} is missing (1 tensors of")


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.9.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        f"{TOWER}bottleneck.regularizer.stochastic_temperature_inv",
        f"{TOWER}encoder.vision_tower.weight",
        "model.diffusion_connector.4.weight",
        "model.sana.transformer_blocks.0.attn1.to_q.bias",
        "model.sana_vae.encoder.quant.weight",
        "model.mm_projector.weight",
        "score.weight",
        "model.mmdit.proj_out.bias",  # of another family, whose part has a tensor of that name
    ],
)
def test_a_tensor_is_one_too_many(copy, key):
    copy.tensors[key] = torch.ones(3)
    save_again(copy)
    (file,) = (
        name for name in SHARDS if key in published.safetensors.torch.load_file(copy.path / name)
    )
    refused(
        copy,
        f"{copy.path / file}: {key} belongs to no parameter of",
        "correct the sizes or remove it",
    )


@pytest.mark.parametrize("key", KEYS)
def test_a_shape_is_another(copy, key):
    shape = list(copy.tensors[key].shape)
    copy.tensors[key] = torch.zeros([shape[0] + 1, *shape[1:]])
    save_again(copy)
    refused(
        copy,
        str(copy.path),
        f"{key} has shape {[shape[0] + 1, *shape[1:]]}, but ",
        f"makes it {shape}",
    )


def test_a_dtype_that_is_no_number_of_a_network(copy):
    for dtype, word in ((torch.int8, "int8"), (torch.float64, "float64")):
        copy.tensors["model.norm.weight"] = torch.ones(copy.model.ar.hidden_size, dtype=dtype)
        save_again(copy)
        refused(copy, str(copy.path), f"model.norm.weight has dtype {word}")


def test_config_json_contradicts_the_weights(copy):
    file = copy.path / "config.json"
    whole = file.read_text()
    ar, rows = copy.model.ar, copy.model.ar.vocab_size
    for changes, words in (
        (
            {"vocab_size": rows + 8},
            (f"{EMBEDDINGS} has shape [{rows}, {ar.hidden_size}]", f"makes it [{rows + 8}, "),
        ),
        (
            {"vocab_size": rows - 1},
            (f"vocab_size={rows - 1}, but text tokenizer and image tokens have {rows} ids",),
        ),
        (
            {"num_hidden_layers": ar.num_hidden_layers + 1},
            (f"model.layers.{ar.num_hidden_layers}.", "is missing"),
        ),
        (
            {"num_hidden_layers": ar.num_hidden_layers - 1},
            (f"model.layers.{ar.num_hidden_layers - 1}.", "belongs to no"),
        ),
        ({"hidden_size": ar.hidden_size + 2}, ("model.embed_tokens.weight has shape",)),
        (
            {"image_start_tag_id": 7},
            ("image_start_tag_id=7, but the tokenizer's files and the codebook make it",),
        ),
        ({"image_end_token_id": rows}, (f"image_end_token_id={rows}, but",)),
        ({"scale_start_token_id": 3}, ("scale_start_token_id=3, but",)),
        ({"num_image_tokens": 64}, ("num_image_tokens=64, but",)),
        ({"hidden_size": None}, ("lacks hidden_size",)),
        ({"model_type": "llama"}, ("model_type='llama' is not supported",)),
        ({"blip3o_jax": 3}, ("blip3o_jax must be a group of fields",)),
        (
            {"blip3o_jax": {"model": {"ar": {"hiden_size": 3}}}},
            ("unknown config key", "did you mean", "hidden_size"),
        ),
        (
            {"blip3o_jax": {"max_length": "long"}},
            ("blip3o_jax", "max_length='long' must be of type int"),
        ),
        (
            {"blip3o_jax": {"sampling": {"top_k": "all"}}},
            ("blip3o_jax.sampling", "top_k='all' must be of type int"),
        ),
    ):
        file.write_text(whole)
        edit_json(file, **changes)
        refused(copy, str(file), *words)
    for contents, word in (("{", "cannot be read as JSON"), ("[]", "is not a JSON object")):
        file.write_text(contents)
        refused(copy, str(file), word)
    file.unlink()
    refused(copy, f"{copy.path} holds no config.json")


def test_a_tied_head_that_differs(copy):
    copy.tensors[HEAD] = copy.tensors[HEAD].clone()
    copy.tensors[HEAD][3, 1] += 1
    save_again(copy)
    (file,) = (
        name for name in SHARDS if HEAD in published.safetensors.torch.load_file(copy.path / name)
    )
    refused(
        copy, f"{copy.path / file}: {HEAD} differs from {EMBEDDINGS}", "tie_word_embeddings: true"
    )
    edit_json(copy.path / "config.json", tie_word_embeddings=False)
    assert HEAD in open_source(copy.path, **copy.arguments).tensors["ar"]
    del copy.tensors[HEAD]
    save_again(copy)
    refused(copy, f"{HEAD} is missing")


def test_another_text_tokenizer(copy):
    published.write_bpe(copy.path, added=["<extra>"])
    refused(copy, str(copy.path / "config.json"), "use the tokenizer that belongs to the weights")
    (copy.path / "tokenizer.json").unlink()
    refused(copy, f"{copy.path} holds no text tokenizer (tokenizer.json")


def test_other_files_of_the_source_directory(copy, tmp_path):
    refused(
        copy,
        "sana/transformer/config.json",
        diffusion=copy_of(copy.arguments["diffusion"], tmp_path, num_layers=9),
    )
    refused(copy, "holds none of transformer/, vae/, scheduler/", diffusion=copy.path)
    refused(copy, str(tmp_path / "nowhere"), diffusion=tmp_path / "nowhere")
    sizes = tmp_path / "sizes.json"
    published.write_json(sizes, {"encoders": {}})
    refused(copy, f"{sizes}: key='encoders' is not one of encoder", ta_tok_config=sizes)
    published.write_json(sizes, {"bottleneck_dim": "8"})
    refused(copy, str(sizes), "bottleneck_dim='8' must be of type int", ta_tok_config=sizes)
    published.write_json(sizes, {"codebook_size": published.CODES})
    refused(
        copy, TOWER, f"{sizes} (over the published so400m tokenizer) requires", ta_tok_config=sizes
    )
    published.write_json(sizes, {})
    refused(copy, "text tokenizer's files hold only some of the image tokens", ta_tok_config=sizes)
    stated = json.loads(copy.arguments["ta_tok_config"].read_text())
    for changes, words in (
        ({"patch_size": 5}, ("patch_embedding.weight has shape", f"but {sizes} (over ")),
        (
            {"num_attention_heads": 3},
            (
                f"TA-Tok args and {sizes}: model.tokenizer.encoder.hidden_size=",
                "num_attention_heads=3",
            ),
        ),
    ):
        published.write_json(sizes, stated | {"encoder": stated["encoder"] | changes})
        refused(copy, *words, ta_tok_config=sizes)
    sana = copy_of(copy.arguments["diffusion"], tmp_path / "caption", caption_channels=3)
    refused(
        copy,
        "connector.0.weight has shape",
        f"config.json with {sana / 'transformer' / 'config.json'}",
        diffusion=sana,
    )
    sana = copy_of(copy.arguments["diffusion"], tmp_path / "channels", in_channels=3)
    refused(
        copy, f"{sana / 'vae' / 'config.json'}: model.dit.in_channels=3 must equal", diffusion=sana
    )
    refused(copy, "/nowhere.pth does not exist", ta_tok=tmp_path / "nowhere.pth")
    file = tmp_path / "ta_tok.pth"
    file.write_bytes(b"PK\x03\x04 cut off")
    refused(copy, f"{file} cannot be read as a PyTorch file", ta_tok=file)
    torch.save({"state_dict": {}}, file)
    refused(copy, f"{file} is not a TA-Tok file: it has no model.sd", ta_tok=file)
    torch.save({"model": {"sd": {"w": 3}, "args": {}}}, file)
    refused(copy, f"{file}: w is of type int, not a tensor", ta_tok=file)
    torch.save({"model": {"sd": {"w": torch.ones(1)}, "args": {"pool": 3}}}, file)
    refused(copy, "TA-Tok args: pool=3 is unknown", ta_tok=file)
    torch.save({"model": {"sd": {"w": torch.ones(1)}, "args": [3]}}, file)
    refused(
        copy,
        f"{file} is not a TA-Tok file: model.args and model.sd must be groups with names",
        ta_tok=file,
    )
    torch.save({"model": {"sd": {7: torch.ones(1)}, "args": {}}}, file)
    refused(
        copy,
        f"{file} is not a TA-Tok file: model.args and model.sd must be groups with names",
        ta_tok=file,
    )
    published.save(tmp_path / "own", "ta_tok", {"w": torch.ones(1)})
    published.write_json(tmp_path / "own" / "args.json", {"pool": 3})
    for place in (tmp_path / "own", tmp_path / "own" / "ta_tok.safetensors"):
        refused(copy, "TA-Tok args: pool=3 is unknown", ta_tok=place)
    args = {"bottleneck": {"args": {"regularizer": {"args": {"codebook_size": published.CODES}}}}}
    published.write_json(tmp_path / "own" / "args.json", args)
    words = (TOWER, "the published so400m tokenizer (--ta_tok_config=FILE.json states another)")
    refused(copy, *words, ta_tok=tmp_path / "own", ta_tok_config=None)


def copy_of(sana, place, **changes):
    shutil.copytree(sana, place / "sana")
    edit_json(place / "sana" / "transformer" / "config.json", **changes)
    return place / "sana"


def test_parts_that_are_not_there(copy):
    for part, prefix, word in (
        ("tokenizer", TOWER, "give --ta_tok=FILE"),
        ("dit", "model.sana.", "give --diffusion=DIR with weights"),
        ("vae", "model.sana_vae.", "give --diffusion=DIR with weights"),
        ("connector", "model.diffusion_connector.", "use --initialise=connector"),
    ):
        kept = copy.tensors
        copy.tensors = {key: x for key, x in kept.items() if not key.startswith(prefix)}
        save_again(copy)
        refused(copy, f"{copy.path} holds no tensors of part {part} ({prefix}*)", word)
        copy.tensors = kept
    save_again(copy)
    refused(copy, "--initialise=connector, but ", "holds its tensors", initialise=("connector",))
    refused(copy, "--initialise='conector' is not one of connector", initialise=("conector",))
    rows = copy.model.ar.vocab_size
    words = (
        "--initialise=image_embeddings, but the tables of",
        f"already have rows for all {rows} ids: remove the option",
    )
    refused(copy, *words, initialise=("image_embeddings",))


def listing(directory):
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None
        for p in directory.rglob("*")
    }


@pytest.fixture(params=["import", "export"])
def convert(request, imported):
    """Write one or the other to a directory."""
    source, root = imported
    write = {
        "import": lambda out, **s: import_weights(source, out, **s),
        "export": lambda out, **s: export_weights(root, out, **s),
    }
    return write[request.param]


def not_written(convert, out, *words, **settings):
    """Check that it is refused in one line, with everything else as it was."""
    before = listing(out.parent) if out.parent.is_dir() else None
    with pytest.raises(UserError) as error:
        convert(out, **settings)
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    assert (listing(out.parent) if out.parent.is_dir() else None) == before


def test_targets_that_cannot_be_written(convert, tmp_path):
    (tmp_path / "file").write_text("")
    not_written(convert, tmp_path / "file" / "out", f"{tmp_path / 'file'}")
    not_written(convert, pathlib.Path("/proc/blip3o/out"), "/proc/blip3o")


def test_targets_that_are_there_already(convert, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    not_written(convert, out, "exists already: choose another --out, or pass --overwrite")
    not_written(
        convert, out, "was not written by blip3o convert and is not overwritten", overwrite=True
    )
    (out / "config.json").write_text("{}")  # as of any model
    not_written(
        convert, out, "was not written by blip3o convert and is not overwritten", overwrite=True
    )
    shutil.rmtree(out)
    convert(out)
    not_written(convert, out, "exists already")
    (out / "thesis.tex").write_text("years of work")
    not_written(
        convert, out, "holds thesis.tex, which blip3o convert did not write", overwrite=True
    )
    (out / "thesis.tex").unlink()
    (out / "config.json").write_text("{}")
    convert(out, overwrite=True)
    assert len((out / "config.json").read_text()) > 1000


def test_targets_that_hold_what_is_read(imported, copy, tmp_path):
    source = open_source(copy.path, **copy.arguments)
    before = listing(tmp_path)
    not_written(
        lambda out: import_weights(source, out, overwrite=True),
        copy.path,
        "overlaps",
        str(copy.path / "model-0000"),
    )
    not_written(lambda out: import_weights(source, out, overwrite=True), tmp_path, "overlaps")
    root = shutil.copytree(imported[1], tmp_path / "run" / "checkpoints")
    for out in (root, root / "out", root.parent):
        not_written(
            lambda out: export_weights(root.parent, out, overwrite=True),
            out,
            "overlaps",
            f"{root}, which is read",
        )
    shutil.rmtree(root.parent)
    assert listing(tmp_path) == before


@contextlib.contextmanager
def largest_file(size):
    """Limit files: nothing can be written beyond `size` bytes of a file, which fails as a full disk
    does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up(convert, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL, "asyncio")  # of the writes that Orbax had begun
    with largest_file(30_000):
        not_written(
            convert, tmp_path / "out", "out was not written: ", "File too large: raise the limit"
        )
    gc.collect()
    convert(tmp_path / "out")


def test_a_disk_that_is_seen_to_be_too_small(convert, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(directory_module.shutil, "disk_usage", lambda _: usage(10**6, 0, 10**4))
    not_written(convert, tmp_path / "out", "out needs 0.1 MB, but ", " has 0.0 MB free")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_disk_that_is_full_while_exporting(imported, tmp_path, monkeypatch, call):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, refuse)
    convert = lambda out: export_weights(imported[1], out)
    not_written(
        convert, tmp_path / "out", "out was not written: ", "No space left on device: free some"
    )


def test_an_import_of_several_processes(imported, tmp_path, monkeypatch):
    monkeypatch.setattr(importer.jax, "process_count", lambda: 2)
    not_written(
        lambda out: import_weights(imported[0], out), tmp_path / "out", "import runs in one process"
    )


def test_numbers_too_large_for_the_dtype(copy, imported, tmp_path):
    """Refuse them in an import and in an export; infinities of the source itself stay."""
    key = "model.layers.0.mlp.up_proj.weight"
    copy.tensors[key] = copy.tensors[key].clone()
    copy.tensors[key][1, 2] = 1e5
    save_again(copy)
    source = open_source(copy.path, **copy.arguments, dtype="float16")
    words = (f"{key} holds 99840, too large for float16: choose a wider --dtype",)
    not_written(lambda out: import_weights(source, out), tmp_path / "out", *words)
    import_weights(open_source(copy.path, **copy.arguments), tmp_path / "large")
    not_written(
        lambda out: export_weights(tmp_path / "large", out, dtype="float16"),
        tmp_path / "out",
        *words,
    )
    copy.tensors[key][1, 2] = np.inf
    save_again(copy)
    import_weights(open_source(copy.path, **copy.arguments, dtype="float16"), tmp_path / "infinite")


def test_parts_that_an_export_does_not_take(imported, tmp_path):
    for parts, words in (
        (("ar", "dit", "ar"), "--parts names ar twice"),
        (("ar", "sana"), "--parts='sana' is not one of ar, dit, vae, ta_tok"),
    ):
        not_written(
            lambda out, parts=parts: export_weights(imported[1], out, parts=parts),
            tmp_path / "out",
            words,
        )


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"dtypes": [], "tied": true}', '{"dtypes": 3}'])
def test_a_damaged_record(imported, tmp_path, text):
    root = shutil.copytree(imported[1], tmp_path / "checkpoint")
    assert (root / "conversion.json").is_file()
    (root / "conversion.json").write_text(text)
    not_written(
        lambda out: export_weights(root, out), tmp_path / "out", str(root / "conversion.json")
    )


def test_a_source_that_changes_under_the_import(copy, tmp_path):
    """Change the tensors of a file whose headers were right when they were read."""
    source = open_source(copy.path, **copy.arguments)
    file = copy.path / SHARDS[0]
    os.truncate(file, file.stat().st_size - 2000)
    not_written(
        lambda out: import_weights(source, out),
        tmp_path / "out",
        f"{file} is cut off within ",
        "copy it again",
    )


def test_a_checkpoint_that_is_none_or_not_whole(imported, tmp_path):
    convert = lambda out: export_weights(tmp_path / "pictures", out)
    not_written(convert, tmp_path / "out", "pictures does not exist")
    (tmp_path / "pictures").mkdir()
    not_written(convert, tmp_path / "out", "pictures is not a checkpoint: it holds no config.json")


AGAIN = ("0 is damaged (state/", "): copy the checkpoint again; no other step is intact")


def overwritten(file):
    file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size))


@pytest.mark.parametrize(
    ("pattern", "spoil", "words"),
    [
        ("0/state/**/d/*", overwritten, AGAIN),
        (
            "0/state/ocdbt.process_0/d/*",
            lambda file: os.truncate(file, file.stat().st_size // 2),
            AGAIN,
        ),
        ("0/state/manifest.ocdbt", pathlib.Path.unlink, AGAIN),
        ("0/state/_METADATA", pathlib.Path.unlink, AGAIN),
        ("0/state/_METADATA", lambda file: file.write_text("{"), AGAIN),
        (
            "config.json",
            lambda file: file.write_text("{"),
            ("config.json cannot be read as JSON", "put back a copy"),
        ),
        ("config.json", lambda file: file.write_text("[]"), ("config.json is no JSON object",)),
    ],
)
def test_a_checkpoint_that_is_damaged(imported, tmp_path, pattern, spoil, words):
    root = shutil.copytree(imported[1], tmp_path / "checkpoint")
    files = list(root.glob(pattern))
    assert files
    for file in files:
        spoil(file)
    not_written(lambda out: export_weights(root, out), tmp_path / "out", str(root), *words)


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"num_hidden_layers": 1}, "ar/layers/"),
        ({"num_hidden_layers": 9}, "ar/layers/"),
        ({"intermediate_size": 7}, "ar/layers/mlp/"),
        ({"tie_word_embeddings": False}, "ar/lm_head/kernel is stored as nothing"),
        (
            {"lora": {"rank": 2, "alpha": 1.0, "targets": ["q"]}},
            "ar/layers/attention/q/lora_a is stored as nothing",
        ),
    ],
)
def test_a_checkpoint_with_the_config_json_of_another_model(imported, tmp_path, changes, parameter):
    """Refuse it: no layer may be left out."""
    root = shutil.copytree(imported[1], tmp_path / "checkpoint")
    values = checksums.read_json(root / "config.json")
    values["model"]["ar"] |= changes
    published.write_json(root / "config.json", values)
    words = (
        f"{root}: {parameter}",
        "but config.json there makes it",
        "restore the config.json that was written with the weights",
    )
    not_written(lambda out: export_weights(root, out), tmp_path / "out", *words)


def test_the_root_of_all_is_no_target(imported):
    with pytest.raises(UserError, match=r"^/ overlaps .*, which is read"):
        export_weights(imported[1], pathlib.Path("/"), overwrite=True)
