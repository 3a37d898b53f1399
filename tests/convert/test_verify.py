"""The comparison itself: nothing found where nothing differs, and the right tensor and layer where
something does.
"""

import dataclasses
import functools
import importlib
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blip3o_jax import checksums
from blip3o_jax.config import UserError
from blip3o_jax.convert import exporter, importer, mapping, report, source, verify, weight_files
from blip3o_jax.data.sources import open_mixture
from blip3o_jax.demo.recipe import recipe
from blip3o_jax.train import checkpoint
from blip3o_jax.train.state import WEIGHTS, plan_state
from blip3o_jax.train.vocabulary import with_vocabulary
from tests import tiny

OUTPUTS = {
    "tokenizer": ["features", "indices", "decoded features"],
    "ar": ["hidden states", "logits"],
    "connector": ["condition"],
    "dit": ["velocity"],
    "vae": ["encode to 2 x 2", "encode to 2 x 3", "decode 2 x 3"],
    "joint": ["cross entropy", "flow loss"],
}
TOWER = "model.vision_tower.vision_tower."
# Part -> (tensors that are altered, {output: first layer to differ}) in `altered`. The joint losses
# take the AR's fault too.
ALTERED = {
    "tokenizer": (
        [
            f"{TOWER}bottleneck.in_linear.bias",
            f"{TOWER}decoder.vision_model.encoder.layers.1.mlp.fc1.weight",
        ],
        {"indices": "", "decoded features": f"{TOWER}decoder.vision_model.encoder.layers.1"},
    ),
    "ar": (
        ["model.layers.1.self_attn.v_proj.weight"],
        {"hidden states": "model.layers.1", "logits": "model.layers.1"},
    ),
    "connector": (["model.diffusion_connector.2.weight"], {"condition": ""}),
    "dit": (
        ["model.sana.transformer_blocks.1.attn2.to_v.weight"],
        {"velocity": "model.sana.transformer_blocks.1"},
    ),
    "vae": (
        ["model.sana_vae.decoder.up_blocks.1.1.conv2.weight"],
        {"decode 2 x 3": "model.sana_vae.decoder.up_blocks.1.1"},
    ),
    "joint": ([], {"cross entropy": "model.layers.1", "flow loss": "model.layers.1"}),
}


@pytest.fixture(scope="module", autouse=True)
def plans_made_once():
    """Make plans once: every part that is restored plans the whole state, which for a tiny model is
    most of the time.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "plan_state", functools.cache(checkpoint.plan_state))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return (configuration, text tokenizer, weights) of a run, all drawn: nothing is compiled."""
    return drawn(tiny.run_config(tiny.data()), tmp_path_factory.mktemp("text"))


def drawn(cfg, directory, deviation=lambda leaf: 0.2):
    """Return what `write_weights` takes, its text tokenizer made in `directory`; `deviation` of
    each leaf's values.
    """
    cfg, vocabulary = with_vocabulary(cfg, open_mixture(cfg.data), directory)
    abstract = plan_state(cfg, tiny.strategy()).abstract
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(float(path[-1].key == "scale"), deviation(leaf), leaf.shape).astype(
            leaf.dtype
        )
        return jax.device_put(values, leaf.sharding)

    return (
        cfg,
        vocabulary.tokenizer,
        jax.tree.map_with_path(draw, {group: abstract[group] for group in WEIGHTS}),
    )


@pytest.fixture(scope="module")
def directories(trained, tmp_path_factory):
    """Return (PyTorch's files, the checkpoint that was imported from them)."""
    root = tmp_path_factory.mktemp("verify")
    checkpoint.write_weights(root / "run", *trained)
    exporter.export_weights(root / "run", root / "torch")
    importer.import_weights(source.open_source(root / "torch"), root / "jax")
    return root / "torch", root / "jax"


@pytest.fixture(scope="module")
def same(directories):
    return verify.verify(*directories)


@pytest.fixture(scope="module")
def altered(directories, tmp_path_factory):
    """Return the report where one element of a tensor or two in each part is another."""
    torch_dir = tmp_path_factory.mktemp("altered") / "torch"
    shutil.copytree(directories[0], torch_dir)
    tensors = load_file(torch_dir / "model.safetensors")
    for names, _ in ALTERED.values():
        for name in names:
            tensors[name].flat[3] += 1
    save_file(tensors, torch_dir / "model.safetensors", {"format": "pt"})
    return verify.verify(torch_dir, directories[1])


def part(found, name):
    return next(p for p in found.parts if p.part == name)


@pytest.mark.parametrize("name", OUTPUTS)
def test_nothing_differs(same, name):
    found = part(same, name)
    assert found.ok and not found.differing and (found.tensors > 0) == (name != "joint")
    assert [output.name for output in found.outputs] == OUTPUTS[name]
    for output in found.outputs:
        if output.name == "indices":
            assert (output.error, output.agreement) == (None, 1.0)
        else:
            assert output.error < report.TOLERANCE / 3, output
        assert (output.first_layer, output.first_layer_error) == ("", None)


def test_every_tensor_is_compared(same, directories):
    held = load_file(directories[0] / "model.safetensors")
    assert sum(p.tensors for p in same.parts) == sum("scale_layer" not in name for name in held)
    assert same.ok and same.notes == ()


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_element_is_found(altered, name):
    """Find it by its tensor, by the outputs it reaches and by the layer it is in."""
    tensors, layers = ALTERED[name]
    found = part(altered, name)
    assert not altered.ok and not found.ok
    assert [d.tensor for d in found.differing] == tensors
    assert all(
        0.5 < d.error < 10 for d in found.differing
    )  # 1, relative to values of deviation 0.2
    assert {output.name: output.first_layer for output in found.outputs if not output.ok} == layers
    for output in found.outputs:
        if output.name == "indices":
            assert output.error is None and 0 <= output.agreement < 1
        else:
            assert (output.error <= report.TOLERANCE) == output.ok
        assert (output.first_layer_error or 0) > report.TOLERANCE or not output.first_layer


def test_a_fault_in_the_table_itself_shows_in_the_outputs(
    trained, directories, tmp_path, monkeypatch
):
    """Find it although imported and compared by the same wrong table all weights agree; PyTorch's
    model is not filled by it.
    """
    table, exchanged = mapping.rules, {"gate": "up", "up": "gate"}

    def wrong(part, cfg):
        path = lambda p: (
            "/".join(exchanged.get(name, name) for name in p.split("/"))
            if p.startswith("layers/mlp")
            else p
        )
        return [
            dataclasses.replace(rule, paths=tuple(map(path, rule.paths)))
            for rule in table(part, cfg)
        ]

    cfg, tokenizer, weights = trained
    ar = weights["params"]["ar"]
    mlp = {exchanged.get(name, name): leaf for name, leaf in ar["layers"]["mlp"].items()}
    imported = {"ar": ar | {"layers": ar["layers"] | {"mlp": mlp}}}
    params = weights["params"] | imported
    checkpoint.write_weights(tmp_path, cfg, tokenizer, weights | {"params": params})
    monkeypatch.setattr(mapping, "rules", wrong)
    monkeypatch.setattr(verify, "groups", mapping.groups.__wrapped__)
    found = part(verify.verify(directories[0], tmp_path, parts=["ar"]), "ar")
    assert not found.differing and not found.ok
    assert {output.first_layer for output in found.outputs} == {"model.layers.0"}


def test_a_fault_in_the_reader_itself_shows_in_the_weights(directories, tmp_path, monkeypatch):
    """Import from stale shards, which PyTorch does not read where there is a single file."""
    stale = shutil.copytree(directories[0], tmp_path / "torch")
    tensors = load_file(stale / "model.safetensors")
    connector = {name: 2 * x for name, x in tensors.items() if "diffusion_connector" in name}
    save_file(tensors | connector, stale / "shard.safetensors", {"format": "pt"})
    places = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "shard.safetensors")}
    (stale / "model.safetensors.index.json").write_text(json.dumps(places))
    monkeypatch.setitem(
        weight_files.ORDER, "transformers", weight_files.ORDER["transformers"][::-1]
    )
    importer.import_weights(source.open_source(stale), tmp_path / "jax")
    found = verify.verify(stale, tmp_path / "jax", parts=["connector"])
    assert {d.tensor for d in found.parts[0].differing} == set(connector)


def test_only_the_parts_that_are_named_and_settings_that_differ(directories, tmp_path):
    other = shutil.copytree(directories[1], tmp_path / "other")
    config = checksums.read_json(other / "config.json")
    config["model"]["connector"]["rms_norm_eps"] = 0.1
    (other / "config.json").write_text(json.dumps(config))
    found = verify.verify(directories[0], other, parts=["connector"])
    assert [p.part for p in found.parts] == ["connector"]
    assert not found.ok and not found.parts[0].differing and found.parts[0].outputs[0].error > 1e-3
    assert found.notes == (
        "connector.rms_norm_eps is 1e-05 in the files and 0.1 in the checkpoint",
        "joint losses were not compared: they need ar, dit too",
    )
    with pytest.raises(UserError, match="'text_tower' is not one of tokenizer, ar"):
        verify.verify(*directories, parts=["text_tower"])


def test_weights_are_compared_in_the_wider_dtype(trained, directories, tmp_path):
    """Check that a checkpoint in float32 is not the bfloat16 files it was not made from, and the
    other way round; it is said which is which.
    """
    cfg, tokenizer, weights = trained
    narrow = dataclasses.replace(cfg.model.connector, param_dtype="bfloat16")
    half = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, connector=narrow))
    rounded = jax.tree.map(lambda x: x.astype("bfloat16"), weights["params"]["connector"])
    checkpoint.write_weights(
        tmp_path / "half",
        half,
        tokenizer,
        weights | {"params": weights["params"] | {"connector": rounded}},
    )
    exporter.export_weights(tmp_path / "half", tmp_path / "torch")
    tensors = {
        name
        for name in load_file(directories[0] / "model.safetensors")
        if "diffusion_connector" in name
    }
    run = tmp_path / "half"
    for torch_dir, root, notes in (
        (
            directories[0],
            run,
            ("connector.param_dtype is float32 in the files and bfloat16 in the checkpoint",),
        ),
        (tmp_path / "torch", run, ()),
    ):
        found = verify.verify(torch_dir, root, parts=["connector"])
        assert found.notes[:-1] == notes
        assert {d.tensor for d in found.parts[0].differing} == (tensors if notes else set())
    # bfloat16 numbers held wider are the same numbers.
    importer.import_weights(
        source.open_source(tmp_path / "torch", dtype="float32"), tmp_path / "wide"
    )
    found = verify.verify(tmp_path / "torch", tmp_path / "wide", parts=["connector"])
    assert found.ok and found.notes[0].startswith(
        "connector.param_dtype is bfloat16 in the files and float32"
    )


def test_the_demo_is_exported_and_is_the_same_model(tmp_path):
    """Export position embeddings in the connector and in the DiT, which no published model does."""
    model = list(recipe("", "", fast=True).values())[-1].model
    assert (
        model.connector.positions
        and model.dit.interpolation_scale
        and model.flow.shift != tiny.model().flow.shift
    )
    cfg = dataclasses.replace(tiny.run_config(tiny.data()), model=model)
    # Widths are the demo's: values keep their size from layer to layer.
    weights = drawn(cfg, tmp_path / "text", lambda leaf: 0.5 * max(leaf.shape[-2:][0], 16) ** -0.5)
    checkpoint.write_weights(tmp_path / "run", *weights)
    exporter.export_weights(tmp_path / "run", tmp_path / "torch")
    found = verify.verify(
        tmp_path / "torch", tmp_path / "run", parts=("ar", "connector", "dit")
    )  # others are as the tiny one's
    assert found.ok and found.notes == (), found
    assert [p.part for p in found.parts if p.outputs] == ["ar", "connector", "dit", "joint"]


def test_a_checkpoint_of_another_model(directories, tmp_path):
    cfg = tiny.run_config(tiny.data())
    cfg = dataclasses.replace(cfg, model=tiny.replace_fields(cfg.model, {"dit": {"num_layers": 3}}))
    other = tmp_path / "other"
    checkpoint.write_weights(other, *drawn(cfg, tmp_path / "text"))
    with pytest.raises(
        UserError,
        match=r"model.sana.transformer_blocks.2.\S+: .* has none, .* has it as \[6, 32\]: neither",
    ):
        verify.verify(directories[0], other)


def test_averaged_weights_that_are_not_there(directories):
    with pytest.raises(UserError, match="holds no averaged weights"):
        verify.verify(*directories, ema=True)


def test_a_seed_below_zero(directories):
    with pytest.raises(UserError, match=r"^--seed=-1 must be 0 or more$"):
        verify.verify(*directories, seed=-1)


def test_without_pytorch(directories, monkeypatch):
    package = importlib.import_module("blip3o_jax.convert")
    for name in ("compare", "torch_files", "torch_model"):
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
        monkeypatch.delattr(package, name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"torch is not installed: pip install .*\[convert\]'$"):
        verify.verify(*directories)


def test_json(altered):
    values = json.loads(json.dumps(altered.to_dict(), allow_nan=False))
    assert values["ok"] is False and values["tolerance"] == 1e-5 and values["seed"] == 0
    ar = next(p for p in values["parts"] if p["part"] == "ar")
    assert ar["ok"] is False and ar["differing"][0]["tensor"] == ALTERED["ar"][0][0]
    assert ar["outputs"][0]["first_layer"] == "model.layers.1" and ar["outputs"][0]["ok"] is False
    nan = report.PartReport(
        "ar", 1, (report.Difference("w", np.inf),), (report.Output("logits", np.nan),)
    )
    values = report.Report("a", "b", 0, (nan,), ()).to_dict()
    assert not nan.outputs[0].ok and values["parts"][0]["outputs"][0]["error"] is None
    assert values["parts"][0]["differing"][0]["error"] is None


def test_printed(same, altered, capsys):
    report.print_report(same)
    out = capsys.readouterr().out
    assert "DIFFERS" not in out and "100.00 % agree" in out and "bitwise equal" in out
    assert out.endswith(f"{same.checkpoint} is the same model as {same.torch}\n")
    report.print_report(altered)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{altered.checkpoint} is NOT the same model as {altered.torch}"
    for name, (tensors, layers) in ALTERED.items():
        for tensor in tensors:
            assert any(line.startswith(f"{name}: {tensor} differs, by ") for line in lines)
        for output, layer in layers.items():
            where = (
                f"first differs at {layer}, by "
                if layer
                else "differs outside of the stacked layers"
            )
            assert any(line.startswith(f"{name}: {output} {where}") for line in lines)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_means_bit_by_bit(dtype):
    one = np.array([[1.0, np.nan, 0.0]]).astype(dtype)
    following = one.copy()
    following.view(f"u{one.dtype.itemsize}")[0, 0] += 1
    assert verify._bitwise_equal(one, one.copy()) and verify._bitwise_equal(one.T, one.T.copy())
    assert not verify._bitwise_equal(one, following) and not verify._bitwise_equal(
        one, one.astype("float16")
    )
    assert not verify._bitwise_equal(one, -one)


def test_relative_error():
    want = np.array([3.0, 4.0], np.float32)
    assert report.relative_error(want + np.float32(0.5), want) == pytest.approx(0.5**0.5 / 5)
    assert (
        report.relative_error(want[:1], want) == np.inf
        and report.relative_error(want, 0 * want) == np.inf
    )
    assert report.relative_error(0 * want, 0 * want) == 0
