"""Check the published steps: their models' sizes, what they keep for the backward pass, and the
report."""

import json
import pickle

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from blip3o_jax import cli
from blip3o_jax.bench.sharding import anchors, topology
from blip3o_jax.bench.sharding.compiled_step import FITS, TOO_LARGE
from blip3o_jax.config import ConfigError

NAMES = [anchor.name for anchor in anchors.ANCHORS]
# Parameters of the published models, in 1e9.
PUBLISHED = {
    "16b": 16.3,
    "32b": 32.5,
    "64b": 64.8,
    "llama2-70b": 68.98,
    "llama3.1-8b": 8.03,
    "llama3.1-70b": 70.55,
    "mistral-7b": 7.24,
}


def parameters(ar):
    heads, kv_heads = ar.num_attention_heads * ar.head_dim, ar.num_key_value_heads * ar.head_dim
    layer = ar.hidden_size * (2 * heads + 2 * kv_heads + 3 * ar.intermediate_size)
    return (
        ar.num_hidden_layers * layer
        + (1 if ar.tie_word_embeddings else 2) * ar.vocab_size * ar.hidden_size
    )


@pytest.mark.parametrize("anchor", anchors.ANCHORS, ids=NAMES)
def test_an_anchor_has_the_published_size_and_is_a_task(anchor):
    name = anchor.name.rsplit("-", 2)[0]
    assert parameters(anchor.ar) == pytest.approx(PUBLISHED[name] * 1e9, rel=0.015)
    task = pickle.loads(pickle.dumps(anchors.task_of(anchor)))
    assert task.config.data.batch_size == anchor.rows * topology.parse(anchor.topology).devices
    assert task.config.data.max_length % 128 == 0 and task.config.trainable == ("ar/.*",)


def saved(keep):
    """Return whether a product with the MLP's width (96), one without, and attention's result
    are kept."""
    policy = anchors._kept(keep, mlp=96)
    products = (((1,), (0,)), ((), ()))
    x, wide, narrow = (
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 32), (32, 96), (32, 32))
    )
    answers = [
        policy(jax.lax.dot_general_p, x, w, dimension_numbers=products) for w in (wide, narrow)
    ]
    name = jax.make_jaxpr(lambda x: checkpoint_name(x, "attention"))(1.0).eqns[-1]
    return [bool(answer) for answer in (*answers, policy(name.primitive, x, **name.params))]


def test_what_is_kept():
    assert saved("narrow products") == [False, True, False]
    assert saved("attention") == [False, False, True]
    narrow = anchors._kept("narrow products on the host", mlp=96)
    x, w = jax.ShapeDtypeStruct((8, 32), jnp.float32), jax.ShapeDtypeStruct((32, 32), jnp.float32)
    answer = narrow(jax.lax.dot_general_p, x, w, dimension_numbers=(((1,), (0,)), ((), ())))
    assert (answer.src, answer.dst) == ("device", "pinned_host")
    assert all(anchor.keep in ("", *anchors.KEEP) for anchor in anchors.ANCHORS)


def test_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(topology, "check_compiler", lambda: None)

    def compile_row(task):
        if task.topology.chip.name == "v5p":
            return {
                "status": TOO_LARGE,
                "error": "needs 120.0 GiB of the 95.7 GiB that a device has",
            }
        seconds = {"16b": 10.33 * 1.1, "32b": 12.32 * 0.7}[
            f"{task.config.model.ar.hidden_size // 320}b"
        ]
        return {
            "status": FITS,
            "step_s": seconds,
            "mfu": 0.5,
            "limiter": "compute",
            "memory": {"total": 2**34},
            "compile_s": 1.0,
        }

    only = ("16b-v5e-256", "32b-v5e-256", "32b-v5p-64")
    report = anchors.bench(tmp_path, only, "blip3o bench anchors", compile_row=compile_row)
    assert json.loads((tmp_path / "anchors.json").read_text()) == report
    errors = {row["anchor"]: row["error"] for row in report["rows"]}
    assert errors == {
        "16b-v5e-256": pytest.approx(0.1),
        "32b-v5e-256": pytest.approx(-0.3),
        "32b-v5p-64": "needs 120.0 GiB of the 95.7 GiB that a device has",
    }
    assert report["median_error"] == pytest.approx(0.2)
    anchors.print_report(report)
    said = capsys.readouterr().out
    assert "+10.0%" in said and "-30.0%" in said and "needs 120.0 GiB" in said and "20.0%" in said


def test_an_unknown_anchor_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(ConfigError, match="not one of 32b-v5p-64"):
        anchors.bench(tmp_path, ["gpt4"], "")
    assert cli.main(["bench", "anchors", f"--out={tmp_path}", "--only=gpt4"]) != 0
    assert "gpt4" in capsys.readouterr().err
