import dataclasses
import math
import re

import jax
import pytest

from blip3o_jax import config
from blip3o_jax.config import loader
from blip3o_jax.parallel import memory as room
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.train import memory
from blip3o_jax.train.state import plan_state
from tests import tiny


def changed(cfg, **overrides):
    values = config.to_dict(cfg)
    for key, text in overrides.items():
        loader.override(values, key.replace("__", "."), text)
    return config.from_dict(values)


def check(cfg, strategy=None):
    strategy = strategy or tiny.strategy()
    memory.check_memory(cfg, plan_state(cfg, strategy), strategy)


def test_the_state_is_counted_to_the_byte():
    """Shard over eight devices: what is trained four times (value, gradient, two moments), what
    is frozen once.
    """
    cfg, strategy = tiny.run_config(stage="tokenizer"), tiny.strategy("fsdp", fsdp=8)
    plan = plan_state(cfg, strategy)
    (need,) = memory.state_needs(cfg, plan)
    trained, frozen = (jax.tree.leaves(plan.abstract[group]) for group in ("params", "frozen"))
    shard = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    assert need.bytes == 4 * sum(map(shard, trained)) + sum(map(shard, frozen))
    assert need.bytes < 4 * sum(x.size * x.dtype.itemsize for x in trained)
    assert need.setting == "model.tokenizer"


@pytest.mark.parametrize(
    ("stage", "overrides", "names"),
    [
        ("autoencoder", {"data__batch_size": "16777216"}, "data.batch_size=16777216"),
        ("autoencoder", {"model__image_size": "16384"}, "model.image_size=16384"),
        ("contrastive", {"data__batch_size": "4194304"}, "data.batch_size=4194304"),
        (
            "contrastive",
            {"model__tokenizer__encoder__image_size": "16384"},
            "model.tokenizer.encoder.image_size=16384",
        ),
        (
            "tokenizer",
            {
                "model__tokenizer__bottleneck_dim": "131072",
                "model__tokenizer__codebook_size": "16777216",
            },
            "model.tokenizer.codebook_size=16777216",
        ),
        ("joint", {"data__max_length": "1048576"}, "data.max_length=1048576"),
        (
            "joint",
            {"model__ar__num_hidden_layers": "1024", "model__ar__hidden_size": "131072"},
            "model.ar.hidden_size=131072",
        ),
    ],
)
def test_the_setting_that_is_too_large_is_named(stage, overrides, names, monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda devices: 3 * 2.0**30)
    with pytest.raises(
        config.ConfigError, match=rf"^{re.escape(names)} takes at least [\d,.]+ GiB"
    ) as error:
        check(changed(tiny.run_config(stage=stage), **overrides))
    assert "\n" not in str(error.value)


def test_published_sizes_are_let_through_where_they_fit(monkeypatch):
    """Accept the joint stage of pretrain.py:1.7b on eight devices of 95 GiB, and not on eight of
    4 GiB.
    """
    cfg = loader.load("configs/pretrain.py:1.7b")
    strategy = Strategy.of(dataclasses.replace(cfg.mesh, data=1, fsdp=8), jax.devices())
    plan = plan_state(cfg, strategy)
    for gib, fits in ((95, True), (4, False)):
        monkeypatch.setattr(memory, "device_bytes", lambda devices, gib=gib: gib * 2.0**30)
        try:
            memory.check_memory(cfg, plan, strategy)
        except config.ConfigError as error:
            assert not fits and str(error).startswith("data.batch_size=512"), str(error)
        else:
            assert fits


def test_devices_of_a_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(room, "host_bytes", lambda: 800)
    assert room.device_bytes(jax.local_devices()) == 100
    room.check_fits([room.Need("a", 60, "cut a"), room.Need("b", 40, "cut b")], 100)
    room.check_fits([room.Need("a", 1e30, "cut a")], None)
    with pytest.raises(
        config.ConfigError, match=r"^a takes at least .* \(0\.0 GiB with the rest\): cut a$"
    ):
        room.check_fits([room.Need("a", 61, "cut a"), room.Need("b", 40, "cut b")], 100)
