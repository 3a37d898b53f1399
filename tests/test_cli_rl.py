"""`blip3o rl`: what it refuses, in one line."""

import pytest

from blip3o_jax import cli
from blip3o_jax.config import RewardConfig


def test_images_are_judged_again_by_the_runs_own_rewards_or_by_those_named(monkeypatch, tmp_path):
    seen = []
    own = (RewardConfig("shapes", weight=0.5),)
    monkeypatch.setattr("blip3o_jax.rl.rescore.rewards_of", lambda run: own)
    monkeypatch.setattr("blip3o_jax.rl.rescore.rescore", lambda run, rewards, out: seen.append((rewards, out)))
    monkeypatch.setattr("blip3o_jax.rl.rescore.print_table", lambda lines, out: None)
    assert cli.main(["rl", "rescore", f"--run={tmp_path}"]) == 0
    assert cli.main(["rl", "rescore", f"--run={tmp_path}", "--reward=shapes", "--reward=ocr", "--out=o"]) == 0
    assert seen[0] == (own, tmp_path / "rescored.jsonl")
    assert ([reward.name for reward in seen[1][0]], str(seen[1][1])) == (["shapes", "ocr"], "o")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rl"], "rl: --config names no file"),
        (["rl", "--config=nowhere.py"], "nowhere.py"),
        (["rl", "serve-rewards", "--reward=ocrr"], "did you mean ocr?"),
        (["rl", "serve-rewards", "--reward=shapes", "--host=0.0.0.0"], "token"),
    ],
)
def test_mistakes(arguments, words, capsys):
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err.strip()
    assert words in told and "\n" not in told


def test_a_server_has_the_rewards_and_limits_that_are_named(monkeypatch):
    seen = []
    monkeypatch.setattr("blip3o_jax.rl.rewards.server.serve", lambda *where, **options: seen.append((where, options)))
    arguments = ["--reward=shapes", "--port=9", "--batch=3", "--score_timeout=7", "--max_body_mb=2", "--metrics_port=10"]
    assert cli.main(["rl", "serve-rewards", *arguments]) == 0
    ((rewards, host, port), options) = seen[0]
    assert ([reward.name for reward in rewards], host, port) == (["shapes"], "127.0.0.1", 9)
    limits = options.pop("limits")
    assert (limits.batch, limits.score_seconds, limits.max_body, limits.max_memory) == (3, 7, 2 << 20, 4 << 30)
    assert options == {"token_env": "", "metrics_host": "127.0.0.1", "metrics_port": 10}
