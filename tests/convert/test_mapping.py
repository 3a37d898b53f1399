"""The name tables against the stock classes' own state dicts, and their layouts there and back."""

import dataclasses

import numpy as np
import pytest

from blip3o_jax.convert import conversions, mapping, tables, torch_model
from blip3o_jax.convert.mapping import Group
from tests import tiny
from tests.convert import published
from tests.convert.published import Options

VARIANTS = {
    "tiny": dataclasses.replace(
        tiny.model(), ar=dataclasses.replace(tiny.model().ar, vocab_size=45)
    ),
    "blocks": published.model(Options(1), 512),
    "empty": published.model(Options(2, vae="empty", qk_norm=False), 48),
    "shuffled": published.model(Options(3, vae="shuffled", tied=False), 43),
}
CASES = [(part, name) for part in tables.CONVERTED_PARTS for name in VARIANTS]


def stock_shapes(part, cfg):
    shapes = {
        key: tuple(value.shape) for key, value in torch_model.part(part, cfg).state_dict().items()
    }
    if part == "ar" and cfg.ar.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


@pytest.mark.parametrize(("part", "name"), CASES)
def test_the_table_holds_every_tensor_of_the_stock_class_and_no_other(part, name):
    assert mapping.tensor_shapes(part, VARIANTS[name]) == stock_shapes(part, VARIANTS[name])


@pytest.mark.parametrize(("part", "name"), CASES)
def test_there_and_back(part, name, rng):
    cfg = VARIANTS[name]
    tensors = {
        key: rng.normal(size=shape).astype(np.float32)
        for key, shape in mapping.tensor_shapes(part, cfg).items()
    }
    arrays = mapping.to_jax(part, cfg, tensors)
    assert {path: array.shape for path, array in arrays.items()} == mapping.parameter_shapes(
        part, cfg
    )
    # Values are only moved: all of them are there, and the padding's zeros.
    values = lambda tree: np.sort(np.concatenate([np.ravel(x) for x in tree.values()]))
    assert np.array_equal(values(tensors), (found := values(arrays))[found != 0])
    back = mapping.to_torch(part, cfg, arrays)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)


def test_layouts():
    """Check that each puts the number at a torch index where the docstring says; dimensions all
    differ.
    """
    w = np.arange(5 * 3 * 2 * 2).reshape(5, 3, 2, 2)
    assert tables.LAYOUTS["conv"].to_jax(w)[1, 0, 2, 4] == w[4, 2, 1, 0]
    assert tables.LAYOUTS["patch"].to_jax(w)[(1 * 2 + 0) * 3 + 2, 4] == w[4, 2, 1, 0]
    assert tables.LAYOUTS["conv1x1"].to_jax(w[:, :, :1, :1])[2, 4] == w[4, 2, 0, 0]
    assert tables.LAYOUTS["linear"].to_jax(w[:, :, 0, 0])[2, 4] == w[4, 2, 0, 0]
    assert tables.LAYOUTS["probe"].to_jax(np.arange(7).reshape(1, 1, 7)).shape == (7,)
    for name, shape in (
        ("conv", (3, 3, 4, 5)),
        ("patch", (27, 5)),
        ("conv1x1", (4, 5)),
        ("linear", (4, 5)),
        ("probe", (4,)),
    ):
        layout = tables.LAYOUTS[name]
        x = np.arange(np.prod(shape)).reshape(shape)
        assert layout.to_torch(x).shape == layout.torch_shape(shape)
        np.testing.assert_array_equal(layout.to_jax(layout.to_torch(x)), x)


def test_layers_keep_their_order_and_places():
    """Check that layer i of the stack is layer i of the stock class; in the VAE's decoder the
    change of resolution comes first.
    """
    cfg = VARIANTS["blocks"]
    numbered = lambda part: {
        key: np.full(shape, i, np.float32)
        for i, (key, shape) in enumerate(mapping.tensor_shapes(part, cfg).items())
    }
    tensors = numbered("vae")
    arrays = mapping.to_jax("vae", cfg, tensors)
    stack = arrays["encoder/stages/0/blocks/conv1/kernel"]
    keys = [f"encoder.down_blocks.0.{i}.conv1.weight" for i in range(2)]
    assert [layer.flat[0] for layer in stack] == [tensors[key].flat[0] for key in keys]
    assert (
        arrays["encoder/stages/0/resample/conv/bias"][0]
        == tensors["encoder.down_blocks.0.2.conv.bias"][0]
    )
    assert (
        arrays["decoder/stages/0/resample/conv/bias"][0]
        == tensors["decoder.up_blocks.0.0.conv.bias"][0]
    )
    assert (
        arrays["decoder/stages/0/blocks/norm/scale"][0, 0]
        == tensors["decoder.up_blocks.0.1.norm.weight"][0]
    )


def test_padding_of_the_vocabulary_is_cut_off_and_filled_with_zeros():
    cfg = VARIANTS["shuffled"]
    assert cfg.ar.padded_vocab_size == 512
    tensors = {
        key: np.ones(shape, np.float32) for key, shape in mapping.tensor_shapes("ar", cfg).items()
    }
    arrays = mapping.to_jax("ar", cfg, tensors)
    assert arrays["embedding"].shape[0] == arrays["lm_head/kernel"].shape[1] == 512
    assert np.all(arrays["embedding"][:43] == 1) and not np.any(arrays["embedding"][43:])
    assert np.all(arrays["lm_head/kernel"][:, :43] == 1) and not np.any(
        arrays["lm_head/kernel"][:, 43:]
    )
    assert mapping.to_torch("ar", cfg, arrays)["lm_head.weight"].shape == (43, cfg.ar.hidden_size)


def test_a_table_that_does_not_fit_the_model_is_found_at_once(monkeypatch):
    cfg = dataclasses.replace(VARIANTS["tiny"], image_size=32)  # not in the cache of `groups`
    complete = conversions.rules("connector", cfg)
    for table, message in ((complete[:-1], "does not name"), (complete + complete[:1], "twice")):
        monkeypatch.setattr(mapping, "rules", lambda *_, table=table: table)
        with pytest.raises(AssertionError, match=message):
            mapping.groups("connector", cfg)


def test_a_group_hands_out_views():
    """Check that no tensor is copied on its way into the shards."""
    group = next(g for g in mapping.groups("ar", VARIANTS["tiny"]) if "q_proj" in g.rule.torch)
    assert isinstance(group, Group) and len(group.tensors) == 2
    tensor = np.zeros(next(iter(group.tensors.values())), np.float32)
    ((path, piece),) = group.to_jax(tensor)
    assert path == "layers/attention/q/kernel" and np.shares_memory(piece, tensor)
