"""Check that both variants of `bench rl` do the same step."""

import dataclasses
import json

import pytest

from blip3o_jax import config
from blip3o_jax.bench import rl_step
from blip3o_jax.config import UserError
from tests.rl import runs

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("token_guidance", [pytest.param(1.0, marks=pytest.mark.slow), 1.5])
def test_both_ways_draw_the_same_images_and_learn_the_same(tmp_path, token_guidance, capsys):
    sampling = dataclasses.replace(runs.run_config().rl.rollout, token_guidance=token_guidance)
    optimizer = config.OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0)
    given = runs.run_config(
        rollout=sampling, optimizer=optimizer, mesh={"data": 8, "fsdp": 1, "strategy": "dp"}
    )
    report = rl_step.bench(given, tmp_path / "out", rounds=2, command="blip3o bench rl")
    assert json.loads((tmp_path / "out/rl.json").read_text(encoding="utf-8")) == report
    equal = report["equal"]
    assert equal["tokens equal"] == equal["pixels equal"] == 1 and equal["reward gap"] == 0
    # float32 sums in another order.
    assert (
        equal["reference gap"] < 1e-5
        and equal["loss gap"] < 1e-5
        and equal["relative gradient gap"] < 1e-5
    )
    for name in rl_step.VARIANTS:
        assert {len(seconds) for seconds in report["seconds"][name].values()} == {2}
        assert report["step"][name] >= max(report["medians"][name].values())
    rl_step.print_report(report)
    assert "a step here is" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(tmp_path):
    for changes in (
        {"policy": "flow"},
        {"kl_coef": 0.0},
        {"rollout": config.SamplingConfig(top_k=5, top_p=1.0)},
    ):
        with pytest.raises(UserError, match=r"bench rl compares rl\.policy=ar"):
            rl_step.bench(runs.run_config(**changes), tmp_path, rounds=1, command="")
