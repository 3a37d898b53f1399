"""What goes in comes out: bit for bit, under the same names, in the same dtypes, for directories of
every kind; what the stock classes make of it; and what a training run leaves of it.
"""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import Qwen3ForCausalLM

from blip3o_jax.config import MeshConfig, UserError, to_dict
from blip3o_jax.convert import export_tensors, mapping, torch_model
from blip3o_jax.convert.exporter import export_weights
from blip3o_jax.convert.importer import import_weights, read_into
from blip3o_jax.convert.mapping import flat
from blip3o_jax.convert.source import open_source
from blip3o_jax.text.vocabulary import Vocabulary
from blip3o_jax.train import checkpoint, supervised
from blip3o_jax.train.state import WEIGHTS
from tests import tiny
from tests.convert import published
from tests.convert.published import EMBEDDINGS, HEAD, PREFIXES, Options, check_equal, planned_once  # noqa: F401
from tests.convert.test_tensor_files import save_easydict
from tests.train.test_loop import Stopped, stop_after

pytestmark = pytest.mark.usefixtures("planned_once")

VALUES = {
    "dtype": ("bfloat16", "float32", "float16"),
    "mixed": (False, True),
    "shards": (1, 3),
    "text": ("bpe", "bpe", "sentencepiece"),
    "named_tokens": (True, True, False),
    "tied": (True, True, False),
    "stored_head": (False, True),
    "spare_rows": (0, 1),
    "latent_connector": (False, True),
    "feature_connector": (False, True),
    "noise_connector": (False, True),
    "scale_layer": (True, False),
    "flat_decoder": (False, True),
    "nested_encoder": (False, True),
    "qk_norm": (True, False),
    "vae": tuple(published.AUTOENCODERS),
}
SEEDS = 5


def options(seed: int) -> Options:
    """Return the seed's options: every value of an option is some seed's, in combinations left to
    chance."""
    fields = {}
    for i, (name, values) in enumerate(VALUES.items()):
        column = np.random.default_rng(i).permutation(np.resize(np.arange(len(values)), SEEDS))
        fields[name] = values[column[seed]]
    fields["stored_head"] &= fields["tied"]
    fields["named_tokens"] |= fields["text"] == "sentencepiece"
    return Options(seed, **fields)


ALL = [options(seed) for seed in range(SEEDS)]


def open_published(made, **changes):
    return open_source(made.directory, **made.arguments | changes)


def round_trip(source, place, **settings):
    """Return the tensors of an import that is exported again."""
    import_weights(source, place / "checkpoint")
    export_weights(place / "checkpoint", place / "out", **settings)
    return published.read(place / "out")


def test_every_option_is_met():
    for name, values in VALUES.items():
        assert {getattr(o, name) for o in ALL} == set(values), name
    assert any(o.text == "bpe" and o.spare_rows for o in ALL) and any(
        not o.tied and o.spare_rows for o in ALL
    )


@pytest.mark.parametrize("options", ALL, ids=[f"{o.seed}-{o}" for o in ALL])
def test_there_and_back(options, tmp_path, monkeypatch):
    if options.seed % 2:  # large tables are converted a few rows at a time, large stacks a layer
        monkeypatch.setattr(export_tensors, "PARALLEL_READ_BYTES", 3000)
    made = published.write(tmp_path, options)
    source = open_published(made)
    model = source.config.model
    assert model.ar.spare_rows == options.spare_rows
    Vocabulary(source.tokenizer, published.CODES).check_model(model.ar, model.tokenizer)
    check_equal(round_trip(source, tmp_path), made.tensors)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: values.get(key, "nothing") for key in made.config} == made.config
    assert "dtype" not in values and str(tmp_path) not in json.dumps(values)
    assert published.text_ids(tmp_path / "out") == published.text_ids(made.directory)
    # What was written says it all: without the other files of the source, it is read as the same
    # model.
    again = open_source(tmp_path / "out")
    assert to_dict(again.config) == to_dict(source.config)
    assert {part: set(tensors) for part, tensors in again.tensors.items()} == {
        part: set(tensors) for part, tensors in source.tensors.items()
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory, planned_once):  # noqa: F811
    """Return (what was published, what was opened, checkpoint): widths that divide over 8 devices,
    bfloat16, an untied head.
    """
    place = tmp_path_factory.mktemp("plain")
    made = published.write(
        place, Options(5, tied=False, feature_connector=True, shards=2), tiny.model()
    )
    source = open_published(made)
    import_weights(source, place / "checkpoint")
    return made, source, place / "checkpoint"


def as_torch(array):
    array = np.asarray(array)
    return (
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype.name == "bfloat16"
        else torch.tensor(array)
    )


def exported_names(part, cfg, arrays):
    """Return {path: array} of a part as published."""
    tensors = mapping.to_torch(part, cfg, {path: np.asarray(x) for path, x in arrays.items()})
    return {PREFIXES[part] + key: as_torch(x) for key, x in tensors.items()}


@pytest.mark.parametrize(
    "mesh", [MeshConfig(1, 8, 1, "fsdp"), MeshConfig(2, 2, 2, "fsdp_tp")], ids=["fsdp", "fsdp_tp"]
)
def test_sharded_over_eight_devices_is_the_same(plain, planned_once, mesh, tmp_path):  # noqa: F811
    made, source, _ = plain
    strategy = tiny.strategy(mesh.strategy, mesh.data, mesh.fsdp, mesh.tensor)
    weights = read_into(planned_once(source.config, strategy), source, source.config)
    single = read_into(planned_once(source.config, tiny.strategy()), source, source.config)
    got, want = (
        {f"{g}/{k}": x for g in WEIGHTS for k, x in flat(tree[g]).items()}
        for tree in (weights, single)
    )
    assert got.keys() == want.keys()
    for path, x in got.items():
        assert (
            x.dtype == want[path].dtype
            and np.asarray(x).tobytes() == np.asarray(want[path]).tobytes()
        ), path
    spread = [x for x in got.values() if not x.sharding.is_fully_replicated]
    assert len(spread) > 80 and not got["params/ar/embedding"].sharding.is_fully_replicated
    copies = [sum(shard.data.nbytes for shard in x.addressable_shards) / x.nbytes for x in spread]
    assert max(copies) <= 4, "of what is sharded no device holds the whole"
    if mesh.strategy == "fsdp":
        import_weights(source, tmp_path / "checkpoint", mesh)
        export_weights(tmp_path / "checkpoint", tmp_path / "out")
        check_equal(published.read(tmp_path / "out"), made.tensors)


def test_dtypes(plain, tmp_path):
    """Check that a wider dtype and back changes nothing; a narrower one rounds as torch does."""
    made, _, _ = plain
    wide = open_published(made, dtype="float32")
    assert wide.record.dtypes == () and wide.config.model.ar.param_dtype == "float32"
    constants = {key: x for key, x in made.tensors.items() if "scale_layer" in key}
    weights = {key: x for key, x in made.tensors.items() if key not in constants}
    noisy = {key: x.float() * (1 + 2**-12) for key, x in weights.items()}
    got = round_trip(wide, tmp_path / "wide")
    check_equal(got, {key: x.float() for key, x in weights.items()} | constants)
    export_weights(tmp_path / "wide" / "checkpoint", tmp_path / "narrow", dtype="bfloat16")
    check_equal(published.read(tmp_path / "narrow"), made.tensors)

    place = tmp_path / "noisy"
    published.save(place / "model", "model", noisy | constants)
    for file in made.directory.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (place / "model" / file.name).write_bytes(file.read_bytes())
    source = open_source(place / "model", **made.arguments, dtype="bfloat16")
    check_equal(
        round_trip(source, place),
        {key: x.to(torch.bfloat16) for key, x in noisy.items()} | constants,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_stock_backbone_with_what_it_lacks_made_anew(tied, tmp_path, monkeypatch):
    """Import Qwen3 with more rows than tokens, SANA, and TA-Tok's own file: rows of no token and
    new ones are the mean of the text's. TA-Tok alone takes pixels in [0, 1], the published layout
    scaled ones; its buffers say so.
    """
    options = Options(11, "float32", tied=tied, named_tokens=False)
    text_rows = published.write_text(tmp_path, options)
    cfg = published.model(options, text_rows + 3)
    ar = published.random_part("ar", cfg, options)
    published.save(tmp_path, "model", ar)
    published.write_json(tmp_path / "config.json", published.qwen3_json(cfg))
    sana = published.write_diffusion(tmp_path / "sana", cfg, options)
    tokenizer = published.random_part("tokenizer", cfg, options)
    buffers = {f"scale_layer.{name}": torch.full((1, 3, 1, 1), 0.5) for name in ("shift", "scale")}
    sizes = published.ta_tok_sizes(cfg)
    regularizer = {
        "codebook_size": published.CODES,
        "l2_normalized": True,
        "stochastic": True,
        "stochastic_temperature": 0.03,
    }
    bottleneck = {
        "bottleneck_dim": sizes.pop("bottleneck_dim"),
        "regularizer": {"name": "simvq", "args": regularizer},
    }
    sizes.pop("codebook_size")
    args = {
        "bottleneck": {"name": "bottleneck", "args": bottleneck},
        "input_size": cfg.tokenizer.encoder.image_size,
    }
    save_easydict(
        monkeypatch,
        tmp_path / "ta_tok.pth",
        args | {"pool_scale": 1, "rand_scale": True},
        tokenizer | buffers,
    )
    published.write_json(tmp_path / "sizes.json", sizes)

    arguments = {
        "diffusion": tmp_path / "sana",
        "ta_tok": tmp_path / "ta_tok.pth",
        "ta_tok_config": tmp_path / "sizes.json",
    }
    with pytest.raises(
        UserError,
        match=rf"vocab_size={text_rows + 3}, but .* have {text_rows + 37} ids; --initialise",
    ):
        open_source(tmp_path, **arguments)
    with pytest.raises(
        UserError, match=r"holds no tensors of part connector .*use --initialise=connector"
    ):
        open_source(tmp_path, **arguments, initialise=("image_embeddings",))
    source = open_source(tmp_path, **arguments, initialise=("connector", "image_embeddings"))
    assert (
        source.config.model.ar.vocab_size == text_rows + 37
        and source.config.model.tokenizer.stochastic
    )
    got = round_trip(source, tmp_path)

    fresh = {key: got.pop(key) for key in [*got] if key.startswith(PREFIXES["connector"])}
    for key in (EMBEDDINGS,) if tied else (EMBEDDINGS, HEAD):
        table, old = got.pop(key), ar.pop(key)
        assert table.shape == (text_rows + 37, cfg.ar.hidden_size)
        assert torch.equal(table[:text_rows], old[:text_rows])
        mean = old[:text_rows].double().mean(0).float()
        torch.testing.assert_close(table[text_rows:], mean.expand(37, -1), rtol=0, atol=1e-7)
        assert torch.equal(table[text_rows:], table[text_rows].expand(37, -1))
    buffers = {
        f"scale_layer.{name}": torch.full((1, 3, 1, 1), value)
        for name, value in (("shift", 0.0), ("scale", 1.0))
    }
    placed = {PREFIXES["tokenizer"] + key: x for key, x in (tokenizer | buffers).items()}
    check_equal(got, ar | sana | placed)
    stock = torch_model.part("connector", cfg).state_dict()
    assert {key.removeprefix(PREFIXES["connector"]): x.shape for key, x in fresh.items()} == {
        k: x.shape for k, x in stock.items()
    }
    torch.testing.assert_close(fresh[PREFIXES["connector"] + "3.weight"], stock["3.weight"])
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["model_type"], values["vocab_size"]) == ("blip3o_qwen", text_rows + 37)
    assert (values["image_start_tag_id"], values["image_end_token_id"]) == (
        text_rows,
        text_rows + 36,
    )


def test_files_of_settings_come_back(plain, tmp_path):
    """Compare the fields of config.json that this package does not use, several ends of a turn, and
    how the source is sampled.
    """
    made, _, root = plain
    directory = tmp_path / "model"
    directory.mkdir()
    for file in made.directory.iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "config.json").unlink()
    own = {
        "eos_token_id": [7, 9],
        "bos_token_id": 3,
        "max_position_embeddings": 777,
        "max_window_layers": 5,
        "use_cache": True,
    }
    own |= {
        "architectures": ["blip3oQwenForInferenceLM"],
        "model_type": "blip3o_qwen_inference",
        "auto_map": {"AutoModel": "x.y"},
    }
    published.write_json(directory / "config.json", made.config | own)
    generation = {
        "do_sample": True,
        "eos_token_id": [7, 9],
        "repetition_penalty": 1.1,
        "temperature": 0.6,
        "top_k": 20,
    }
    published.write_json(directory / "generation_config.json", generation)
    got = round_trip(open_source(directory, **made.arguments), tmp_path)
    check_equal(got, made.tensors)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    stated = made.config | own
    assert {key: values.get(key, "nothing") for key in stated} == stated
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation
    # Another dtype is stated under the key that was there.
    export_weights(tmp_path / "checkpoint", tmp_path / "wide", dtype="float32")
    values = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert values["torch_dtype"] == "float32" and "dtype" not in values
    # A source without such a file gets one.
    export_weights(root, tmp_path / "plain")
    values = json.loads((tmp_path / "plain" / "generation_config.json").read_text())
    assert values["do_sample"] is True and {
        "temperature",
        "top_k",
        "top_p",
        "eos_token_id",
        "pad_token_id",
    } < set(values)


def test_what_the_directory_holds_wins_over_the_diffusers_one(plain, tmp_path):
    made, source, _ = plain
    other = published.write_diffusion(tmp_path / "sana", made.model, Options(99))
    both = open_published(made, diffusion=tmp_path / "sana")
    assert any("are in" in note and "the latter are used" in note for note in both.notes)
    key = "caption_projection.linear_1.weight"
    got = both.tensors["dit"][key].read()
    assert np.array_equal(got, source.tensors["dit"][key].read())
    assert not torch.equal(as_torch(got), other[PREFIXES["dit"] + key])
    assert to_dict(both.config) == to_dict(source.config)


@pytest.mark.parametrize("shards", [1, 2])
def test_torch_files_are_a_source_too(plain, tmp_path, shards):
    made, source, _ = plain
    published.save(tmp_path, "pytorch_model", made.tensors, shards, torch_files=True)
    for file in made.directory.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    found = open_source(tmp_path, **made.arguments)
    assert (
        to_dict(found.config) == to_dict(source.config)
        and found.unread.keys() == source.unread.keys()
    )
    for part, tensors in source.tensors.items():
        assert found.tensors[part].keys() == tensors.keys()
        for key, tensor in tensors.items():
            got, want = found.tensors[part][key].read(), tensor.read()
            assert got.dtype == want.dtype and got.tobytes() == want.tobytes(), key


def test_stock_classes_load_the_parts(plain, tmp_path):
    made, _, root = plain
    export_weights(
        root, tmp_path / "out", parts=("ar", "dit", "vae", "ta_tok"), max_shard_bytes=10_000
    )
    for part, cls in (
        ("ar", Qwen3ForCausalLM),
        ("dit", SanaTransformer2DModel),
        ("vae", AutoencoderDC),
    ):
        dtype = {"dtype" if part == "ar" else "torch_dtype": torch.bfloat16}
        loaded, info = cls.from_pretrained(
            tmp_path / "out" / part, output_loading_info=True, **dtype
        )
        assert not any(
            info[key]
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        ), info
        shapes = torch_model.part(part, made.model).state_dict()
        check_equal(
            loaded.state_dict(), {key: made.tensors[PREFIXES[part] + key] for key in shapes}
        )
        assert len(list((tmp_path / "out" / part).glob("*.safetensors"))) > 1
    file = torch.load(tmp_path / "out" / "ta_tok" / "ta_tok.pth", weights_only=True)["model"]
    assert (
        file["args"]["bottleneck"]["args"]["regularizer"]["args"]["codebook_size"]
        == published.CODES
    )
    buffers = {key: file["sd"].pop(key) for key in [*file["sd"]] if key.startswith("scale_layer.")}
    assert {key: x.unique().item() for key, x in buffers.items()} == {
        "scale_layer.shift": 0.5,
        "scale_layer.scale": 0.5,
    }
    module = torch_model.part("tokenizer", made.model).to(torch.bfloat16)
    module.load_state_dict(file["sd"], strict=True)
    check_equal(
        module.state_dict(),
        {key: made.tensors[PREFIXES["tokenizer"] + key] for key in module.state_dict()},
    )
    # And this package reads them back as the sources they are.
    out = tmp_path / "out"
    arguments = {
        "ta_tok": out / "ta_tok" / "ta_tok.pth",
        "ta_tok_config": out / "ta_tok" / "ta_tok_config.json",
    }
    source = open_source(out / "ar", diffusion=out, **arguments, initialise=("connector",))
    assert np.array_equal(
        source.tensors["vae"]["encoder.conv_out.bias"].read(),
        source_of(plain, "vae", "encoder.conv_out.bias"),
    )
    assert sorted(p.name for p in (out / "ta_tok").iterdir()) == [
        "ta_tok.pth",
        "ta_tok_config.json",
    ]
    again = open_source(
        out / "ar",
        diffusion=out,
        **arguments | {"ta_tok": out / "ta_tok"},
        initialise=("connector",),
    )
    assert to_dict(again.config) == to_dict(source.config)
    assert again.config.model.tokenizer == dataclasses.replace(
        plain[1].config.model.tokenizer, dtype="bfloat16"
    )


def test_ta_tok_without_torch_is_one_file_with_its_args(plain, tmp_path, monkeypatch):
    """Read it as such, file or directory; its args state what the sizes' file does not."""
    made, source, root = plain
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        done = export_weights(root, tmp_path / "out", parts=("ta_tok",), max_shard_bytes=1000)
    assert any("ta_tok is ta_tok.safetensors with args.json" in note for note in done.notes)
    directory = tmp_path / "out" / "ta_tok"
    assert sorted(p.name for p in directory.iterdir()) == [
        "args.json",
        "ta_tok.safetensors",
        "ta_tok_config.json",
    ]
    values = json.loads((directory / "args.json").read_text())
    values["bottleneck"]["args"]["regularizer"]["args"]["stochastic_temperature"] = 0.75
    published.write_json(directory / "args.json", values)
    for place in (directory, directory / "ta_tok.safetensors"):
        found = open_published(made, ta_tok=place, ta_tok_config=directory / "ta_tok_config.json")
        assert found.config.model.tokenizer.stochastic_temperature == 0.75
        assert found.tensors["tokenizer"].keys() == source.tensors["tokenizer"].keys()
    assert source.config.model.tokenizer.stochastic_temperature != 0.75


def source_of(plain, part, key):
    return plain[1].tensors[part][key].read()


@pytest.mark.parametrize("limit", [10_000, 200_000])
def test_shards_have_at_most_the_size_asked_for(plain, tmp_path, limit):
    made, _, root = plain
    export_weights(root, tmp_path / "out", max_shard_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and [f.name for f in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = {key: x.numel() * x.element_size() for key, x in made.tensors.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for file in files:
        held = published.safetensors.torch.load_file(file)
        assert held and (len(held) == 1 or sum(sizes[key] for key in held) <= limit)
        assert {key for key, name in index["weight_map"].items() if name == file.name} == set(held)
    check_equal(published.read(tmp_path / "out"), made.tensors)


@pytest.fixture(scope="module")
def trained(plain, tmp_path_factory):
    """Return the working directory of a run from the imported weights, 2 steps, interrupted after
    the first and resumed.
    """
    _, _, root = plain
    workdir = tmp_path_factory.mktemp("trained")
    model = checkpoint.read_config(root).model
    fast = lambda part: dataclasses.replace(part, dtype="float32")
    model = dataclasses.replace(
        model,
        ar=dataclasses.replace(fast(model.ar), remat="none"),
        dit=dataclasses.replace(fast(model.dit), remat="none"),
        tokenizer=dataclasses.replace(fast(model.tokenizer), encoder=fast(model.tokenizer.encoder)),
        connector=fast(model.connector),
        vae=fast(model.vae),
        text=dataclasses.replace(model.text, path=str(root / "text")),
    )
    parts = tuple((part, str(root)) for part in PREFIXES if part != "latent_connector")
    settings = tiny.run_config(
        tiny.data(),
        steps=2,
        preview=0,
        data={"max_length": 128},
        checkpoint={"every": 1, "init_from": parts},
        optimizer={"ema_decay": 0.5, "learning_rate": 0.05},
    )
    settings = dataclasses.replace(settings, model=model)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 2)
        patch.setattr(checkpoint.Checkpoints, "save", once(checkpoint.Checkpoints.save))
        supervised.train(settings, workdir)
    supervised.train(settings, workdir)
    return workdir


def once(save):
    """Wrap `save` so that only the first step's checkpoint is written."""
    return lambda self, step, *args: save(self, step, *args) if step == 1 else None


@pytest.mark.parametrize("limit", [0, 3000])
def test_no_large_table_is_in_memory_twice(plain, tmp_path, monkeypatch, limit):
    """Write the embedding and an untied head some rows at a time, the last time fewer, and none
    of the padding.
    """
    written = {}
    write = export_tensors.ShardedWriter.write_rows

    def watch(writer, key, rows, first):
        written.setdefault(key, []).append(rows)
        write(writer, key, rows, first)

    monkeypatch.setattr(export_tensors, "PARALLEL_READ_BYTES", limit)
    monkeypatch.setattr(export_tensors.ShardedWriter, "write_rows", watch)
    made, _, root = plain
    export_weights(root, tmp_path / "out")
    check_equal(published.read(tmp_path / "out"), made.tensors)
    for key in (EMBEDDINGS, HEAD):
        assert sum(map(len, written[key])) == len(made.tensors[key])
        assert max(rows.nbytes for rows in written[key]) <= max(limit, written[key][0][0].nbytes)
        assert len(set(map(len, written[key]))) == (2 if limit else 1)


def test_training_from_an_import_leaves_the_frozen_parts_as_they_were(plain, trained, tmp_path):
    made, _, _ = plain
    assert checkpoint.find(trained)[1] == 2
    export_weights(trained, tmp_path / "out")
    assert json.loads((trained / "checkpoints" / "config.json").read_text())["model"]["text"][
        "path"
    ].startswith("/")
    assert '"/' not in (tmp_path / "out" / "config.json").read_text(), "no path of this machine"
    got = published.read(tmp_path / "out")
    assert got.keys() == made.tensors.keys()
    learned = (
        "model.embed_tokens",
        "model.layers",
        "model.norm",
        HEAD,
        PREFIXES["connector"],
        "model.sana.caption",
    )
    frozen = {key for key in got if not key.startswith(learned)}
    assert {PREFIXES[part] for part in ("tokenizer", "dit", "vae", "feature_connector")} <= {
        prefix for prefix in PREFIXES.values() for key in frozen if key.startswith(prefix)
    }
    check_equal({key: got[key] for key in frozen}, {key: made.tensors[key] for key in frozen})
    changed = {
        key for key in got if key not in frozen and not torch.equal(got[key], made.tensors[key])
    }
    assert {EMBEDDINGS, HEAD, "model.norm.weight", "model.sana.caption_norm.weight"} <= changed
    # The run's own directory is a source again.
    check_equal(round_trip(open_source(tmp_path / "out"), tmp_path / "again"), got)


def test_averages(plain, trained, tmp_path):
    _, source, root = plain
    for ema, out in ((True, tmp_path / "ema"), (False, tmp_path / "last")):
        export_weights(trained, out, ema=ema)
        parts = checkpoint.restore_parts(trained, tiny.strategy(), ema=ema)
        for part in ("ar", "dit", "vae"):
            want = exported_names(part, source.config.model, flat(parts[part]))
            got = published.read(out)
            check_equal({key: got[key] for key in want}, want)
    assert not torch.equal(
        *(published.read(tmp_path / name)[EMBEDDINGS] for name in ("ema", "last"))
    )
    with pytest.raises(UserError, match=r"holds no averaged weights: .* remove --ema"):
        export_weights(root, tmp_path / "none", ema=True)
    assert not (tmp_path / "none").exists()


def test_the_import_is_a_checkpoint_like_any_other(plain):
    """Check that `restore_parts` gives the very numbers that were published, padding aside."""
    made, source, root = plain
    parts = checkpoint.restore_parts(root, tiny.strategy())
    assert set(parts) == set(PREFIXES) - {"latent_connector"}
    for part, tree in parts.items():
        want = exported_names(part, source.config.model, flat(tree))
        check_equal({key: made.tensors[key] for key in want}, want)
    config = checkpoint.read_config(root)
    assert config.stage == "joint" and jax.tree.leaves(parts)
