"""Configure tiny runs of reinforcement learning, for the tests."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

from blip3o_jax import config
from blip3o_jax.convert.tables import PUBLISHED_PARTS
from blip3o_jax.train import checkpoint
from tests import tiny
from tests.rl.redness import PROMPTS


@functools.cache
def started_from() -> pathlib.Path:
    """Return the workdir of a joint run, written once a test session."""
    workdir = tiny.scratch()
    tiny.write_checkpoint(workdir)
    lines = [json.dumps({"prompt": prompt, "category": prompt.split()[0]}) for prompt in PROMPTS]
    (workdir / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return workdir


def run_config(
    policy: str = "ar", *, mesh: dict[str, Any] | None = None, **changes: Any
) -> config.Config:
    """Return a run of 2 prompts of 4 images a rollout, with the policy's defaults; `changes` are
    fields of RlConfig, or of Config."""
    root, step = checkpoint.find(started_from())
    given = checkpoint.read_config(root)
    text = dataclasses.replace(given.model.text, path=str(root / "text"), train_size=0)
    rl = config.RlConfig(
        policy=policy,
        prompts_file=str(started_from() / "prompts.jsonl"),
        num_prompts=2,
        num_generations=4,
        rollout=config.SamplingConfig(top_k=0, top_p=1.0, steps=3, guidance=1.5, batch_size=8),
        rewards=(config.RewardConfig(name="python:tests.rl.redness.redness"),),
        workers=1,
        flow=config.FlowPolicyConfig(steps=4, trained_steps=2, noise_level=0.7),
    )
    own = {f.name for f in dataclasses.fields(config.Config)}
    rl = dataclasses.replace(
        rl, **{name: value for name, value in changes.items() if name not in own}
    )
    base = config.Config(
        steps=4,  # the first of which has learning rate 0
        log_every=1,
        preview=0,
        model=dataclasses.replace(given.model, text=text),
        data=config.DataConfig(max_length=given.data.max_length),
        optimizer=config.OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.2),
        mesh=config.MeshConfig(**(mesh or {"data": 1, "fsdp": 1, "strategy": "dp"})),
        checkpoint=config.CheckpointConfig(
            every=100, init_from=tuple((part, str(root / str(step))) for part in PUBLISHED_PARTS)
        ),
        rl=rl,
    )
    return dataclasses.replace(
        base, **{name: value for name, value in changes.items() if name in own}
    )
