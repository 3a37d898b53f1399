"""A checkpoint with low-rank factors goes out as the model without: the sums, bit for bit, and the
same images.
"""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from blip3o_jax import checksums, lora
from blip3o_jax import pipeline as pipelines
from blip3o_jax.config import LoraConfig, to_dict
from blip3o_jax.convert import export_tensors, exporter, mapping, verify
from blip3o_jax.convert.conversions import prefix_of
from blip3o_jax.convert.importer import import_weights
from blip3o_jax.convert.mapping import flat
from blip3o_jax.convert.source import open_source
from blip3o_jax.train import checkpoint
from blip3o_jax.train.state import merge_trees
from tests import tiny
from tests.convert.test_verify import drawn

FACTORS = {
    "ar": {"lora": LoraConfig(3, 2.0, ("q", "o", "down"))},
    "dit": {"lora": LoraConfig(2, 1.0, ("v", "expand"))},
}
SUMS = {
    "ar": 2 * 3,
    "dit": 2 * 3,
}  # tensors that are sums: layers times targets, of which v is in two attentions


@pytest.fixture(scope="module", autouse=True)
def plans_made_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "plan_state", functools.cache(checkpoint.plan_state))
        yield


def written(place, **model):
    """Return (configuration, weights as {part: nested dict}) of a checkpoint with factors at
    `place`/run; B is drawn like all else.
    """
    cfg = tiny.run_config(tiny.data(), data={"max_length": 72}, model=FACTORS)
    cfg, tokenizer, weights = drawn(
        dataclasses.replace(cfg, model=tiny.replace_fields(cfg.model, model)), place
    )
    checkpoint.write_weights(place / "run", cfg, tokenizer, weights)
    return cfg, merge_trees(weights["params"], weights["frozen"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    return place, *written(place)


@pytest.fixture(scope="module")
def exported(trained):
    place, _, _ = trained
    return place / "torch", exporter.export_weights(place / "run", place / "torch")


def sums(part, cfg, tree):
    """Return {tensor name: tensor} of a part: kernels W + alpha / rank A B in float32, by layer."""
    arrays = {path: np.asarray(x) for path, x in flat(tree).items()}
    for path in [path for path in arrays if path.endswith("/lora_a")]:
        a, b, at = arrays.pop(path), arrays.pop(path[:-1] + "b"), path.replace("lora_a", "kernel")
        layers, scale = (
            zip(arrays[at].astype(np.float32), a, b, strict=True),
            np.float32(getattr(cfg, part).lora.scale),
        )
        arrays[at] = np.stack([w + scale * (a @ b) for w, a, b in layers])
    return {
        prefix_of(part, cfg) + key: x
        for key, x in mapping.to_torch(part, lora.base_config(cfg), arrays).items()
    }


def check_same(got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert (
            got[key].dtype == value.dtype
            and got[key].tobytes() == np.ascontiguousarray(value).tobytes()
        ), key


def test_the_files_are_those_of_the_model_without_factors(trained, exported):
    _, cfg, weights = trained
    directory, done = exported
    got = {
        key: x
        for key, x in load_file(directory / "model.safetensors").items()
        if "scale_layer" not in key
    }
    want = {
        key: x for part, tree in weights.items() for key, x in sums(part, cfg.model, tree).items()
    }
    check_same(got, want)
    kernels = {
        key: x
        for part, tree in weights.items()
        for key, x in sums(part, cfg.model, lora.drop_factors(tree)).items()
    }
    assert sum(bool(np.any(want[key] != kernels[key])) for key in want) == sum(SUMS.values())
    model = json.loads((directory / "config.json").read_text())["blip3o_jax"]["model"]
    assert (model["ar"]["lora"]["rank"], model["dit"]["lora"]["rank"]) == (0, 0)
    assert done.notes[:2] == tuple(
        f"low-rank factors of {part} were merged into its weights" for part in ("ar", "dit")
    )
    assert to_dict(open_source(directory).config.model.dit) == to_dict(
        lora.base_config(cfg.model).dit
    )


def test_large_stacks_are_merged_a_layer_at_a_time(trained, exported, tmp_path, monkeypatch):
    place, _, _ = trained
    monkeypatch.setattr(export_tensors, "PARALLEL_READ_BYTES", 0)
    exporter.export_weights(place / "run", tmp_path / "torch")
    check_same(
        *(
            load_file(directory / "model.safetensors")
            for directory in (tmp_path / "torch", exported[0])
        )
    )


def test_verified(trained, exported, tmp_path):
    """Compare outputs: the outputs compared are those of the network with its factors apart. With
    another scale it is another model.
    """
    place, _, _ = trained
    found = verify.verify(exported[0], place / "run", parts=["ar", "dit"])
    assert found.ok and found.notes == (
        "joint losses were not compared: they need connector too",
    ), found
    assert all(part.outputs for part in found.parts)
    other = shutil.copytree(place / "run", tmp_path / "run")
    values = checksums.read_json(other / "config.json")
    values["model"]["ar"]["lora"]["alpha"] = 2.01
    checksums.write_json(other / "config.json", values)
    (ar,) = verify.verify(exported[0], other, parts=["ar"]).parts
    assert len(ar.differing) == SUMS["ar"] and not any(output.ok for output in ar.outputs)


def test_narrow_kernels_are_rounded_once(tmp_path):
    """Round from the float32 sum to what is written, which may be wider than they are."""
    cfg, weights = written(tmp_path, dit={"param_dtype": "bfloat16"})
    want = sums("dit", cfg.model, weights["dit"])
    for dtype in ("", "float32"):
        exporter.export_weights(tmp_path / "run", tmp_path / f"torch{dtype}", dtype=dtype)
        got = {
            k: x
            for k, x in load_file(tmp_path / f"torch{dtype}" / "model.safetensors").items()
            if k in want
        }
        check_same(got, {key: x.astype(dtype or "bfloat16") for key, x in want.items()})
        (dit,) = verify.verify(tmp_path / f"torch{dtype}", tmp_path / "run", parts=["dit"]).parts
        # What bfloat16 loses of the sums is seen in the outputs.
        assert not dit.differing and dit.outputs[0].ok == (dtype == "float32")


def test_images_are_those_of_the_merged_model(trained, exported, tmp_path, monkeypatch):
    """Check that `load` samples with the factors; without them the images are others."""
    place, _, _ = trained
    import_weights(open_source(exported[0]), tmp_path / "merged")
    single = tiny.strategy()
    monkeypatch.setattr(pipelines.Strategy, "of", lambda cfg: single)
    draw = lambda pipeline: pipeline.generate(
        ["a red cat", "a big green boat"], seed=1, batch_size=2, steps=2
    )
    on = pipelines.load(place / "run")
    got, want = draw(on), draw(pipelines.load(tmp_path / "merged"))
    np.testing.assert_array_equal(got.codes, want.codes)
    assert np.abs(got.images.astype(int) - want.images.astype(int)).max() <= 1
    on._params = lora.disable_lora(on._params)
    off = draw(on)
    assert np.any(off.codes != got.codes) and np.any(off.images != got.images)
