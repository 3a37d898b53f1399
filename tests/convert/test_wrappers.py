"""Names with and without what wraps a module when it is saved."""

import pytest
import torch

from blip3o_jax.config import UserError
from blip3o_jax.convert.wrappers import unwrapped_names

NAMES = ["model.norm.weight", "model.sana.module_list.0.weight", "model.sana.proj.bias"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: name,
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module.module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.base_model.model.{name}",
        lambda name: (
            f"_fsdp_wrapped_module.{name.replace('model.', 'model._fsdp_wrapped_module.', 1)}"
        ),
        lambda name: name.replace("model.sana.", "model.sana._orig_mod."),
        lambda name: name.replace("model.sana.", "model.sana.module._orig_mod."),
    ],
)
def test_wrappers_are_removed(wrap):
    assert unwrapped_names(map(wrap, NAMES), ("model.sana.",)) == {
        wrap(name): name for name in NAMES
    }


def test_the_names_that_pytorch_gives():
    """Compare with PyTorch; torch.compile's as its module spells them, since compiling takes
    seconds.
    """
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    names = list(torch.nn.DataParallel(model).state_dict())
    assert list(unwrapped_names(names).values()) == list(model.state_dict()) != names


def test_what_only_some_begin_with_is_no_wrapper():
    names = ["module.weight", "other.weight"]
    assert unwrapped_names(names) == {name: name for name in names}


def test_what_cannot_be_unwrapped():
    for names, words in (
        (
            ["base_model.model.q.lora_A.default.weight"],
            "FILE holds an adapter that is not merged .*lora_A.*: merge it first",
        ),
        (["base_model.model.q.base_layer.weight"], "merge it first"),
        (["a._orig_mod.b", "a.b"], "FILE holds a._orig_mod.b and a.b, which are one tensor"),
    ):
        with pytest.raises(UserError, match=words):
            unwrapped_names(names, (), "FILE")
