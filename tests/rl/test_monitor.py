"""Check the warnings about sampling and scoring that differ."""

import dataclasses

import pytest

from blip3o_jax.config import Config, RlConfig, UserError
from blip3o_jax.rl.monitor import RatioMonitor


def monitor(dtype: str = "float32", **rl: object) -> RatioMonitor:
    cfg = Config(rl=RlConfig(**rl))
    parts = {
        part: dataclasses.replace(getattr(cfg.model, part), dtype=dtype) for part in ("ar", "dit")
    }
    return RatioMonitor(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **parts)))


def gap(mean: float, largest: float = 0.0, name: str = "rl/ratio_gap") -> dict[str, float]:
    return {name: mean, f"{name}_max": max(mean, largest)}


@pytest.mark.parametrize(
    ("dtype", "policy", "usual", "much"),
    [
        ("float32", "ar", gap(9e-7, 1.2e-5), gap(2e-5)),
        ("bfloat16", "ar", gap(6e-3, 0.12), gap(0.04)),
        (
            "float32",
            "flow",
            gap(1e-6, name="rl/flow/ratio_gap"),
            gap(2e-5, name="rl/flow/ratio_gap"),
        ),
        (
            "bfloat16",
            "flow",
            gap(5e-4, name="rl/flow/ratio_gap"),
            gap(2e-3, name="rl/flow/ratio_gap"),
        ),
        (
            "float32",
            "both",
            gap(9e-7) | gap(1e-6, name="rl/flow/ratio_gap"),
            gap(9e-7) | gap(2e-5, name="rl/flow/ratio_gap"),
        ),
    ],
)
def test_more_than_rounding_is_warned_of_once(dtype, policy, usual, much, capsys):
    watch = monitor(dtype, policy=policy)
    watch.check(1, usual)
    assert not capsys.readouterr().err
    watch.check(2, much)
    watch.check(3, much)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "rl: step 2: sampling and scoring disagree" in warnings[0]


@pytest.mark.parametrize("name", ["rl/ratio_gap", "rl/flow/ratio_gap"])
def test_a_bound_stops_the_run_whichever_policy_it_is(name):
    watch = monitor(policy="flow" if "flow" in name else "ar", max_ratio_gap=1e-3)
    watch.check(1, gap(1e-7, 9e-4, name))
    with pytest.raises(
        UserError,
        match=rf"step 2: .* {name} 1e-07, at most 0.0011, more than rl.max_ratio_gap=0.001",
    ):
        watch.check(2, gap(1e-7, 1.1e-3, name))


def test_only_the_first_update_on_a_rollout_that_this_policy_drew(capsys):
    monitor(num_iterations=2).check(2, gap(1.0))
    monitor(off_policy_steps=1, max_ratio_gap=1e-9).check(1, gap(1.0))
    assert not capsys.readouterr().err
