"""`blip3o rl`: what it refuses, in one line."""

import pytest

from blip3o_jax import cli


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


def test_a_server_has_the_rewards_that_are_named(monkeypatch):
    seen = {}
    monkeypatch.setattr("blip3o_jax.rl.rewards.server.serve", lambda reward, *where, **limits: seen.update(limits, at=where))
    assert cli.main(["rl", "serve-rewards", "--reward=shapes", "--port=9", "--batch=3"]) == 0
    assert seen == {"at": ("127.0.0.1", 9), "token_env": "", "max_body_mb": 64, "batch": 3}
