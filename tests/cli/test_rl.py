"""`blip3o rl`: what it refuses, in one line."""

import pytest

from blip3o_jax import cli
from blip3o_jax.config import RewardConfig


def test_images_are_rescored_by_the_rewards_of_the_run_or_by_those_named(monkeypatch, tmp_path):
    seen = []
    own = (RewardConfig("shapes", weight=0.5),)
    monkeypatch.setattr("blip3o_jax.rl.rescore.rewards_of", lambda run: own)
    monkeypatch.setattr(
        "blip3o_jax.rl.rescore.rescore", lambda run, rewards, out: seen.append((rewards, out))
    )
    monkeypatch.setattr("blip3o_jax.rl.rescore.print_table", lambda lines, out: None)
    assert cli.main(["rl", "rescore", f"--run={tmp_path}"]) == 0
    assert (
        cli.main(
            ["rl", "rescore", f"--run={tmp_path}", "--reward=shapes", "--reward=ocr", "--out=o"]
        )
        == 0
    )
    assert seen[0] == (own, tmp_path / "rescored.jsonl")
    assert ([reward.name for reward in seen[1][0]], str(seen[1][1])) == (["shapes", "ocr"], "o")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rl"], "rl needs a config file and a checkpoint to start from: --config="),
        (["rl", "--config=nowhere.py"], "nowhere.py"),
        (
            ["rl", "serve-rewards", "--reward=shapes", "--max_memory_mb=9"],
            "--max_memory_mb=9 is too little for --scorers=2, ",
        ),
        (["rl", "serve-rewards", "--reward=shapes", "--host=0.0.0.0"], "token"),
    ],
)
def test_mistakes(arguments, words, capsys):
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and "\n" not in err


def test_overrides_with_spaces_reach_the_config(monkeypatch, tmp_path):
    """Override argparse, which takes an unknown --x="a b" for the name of a sub-command."""
    seen = []
    monkeypatch.setattr(
        "blip3o_jax.rl.trainer.run", lambda config, workdir: seen.append(config.rl.prompts_file)
    )
    (tmp_path / "c.py").write_text(
        "from blip3o_jax.config import Config\n\ndef get_config():\n    return Config()\n"
    )
    flags = [
        f"--config={tmp_path}/c.py",
        f"--workdir={tmp_path}/w",
        "--config.rl.prompts_file=my prompts.txt",
    ]
    assert cli.main(["rl", *flags]) == 0 and seen == ["my prompts.txt"]


@pytest.mark.parametrize("flag", ["--config=c.py", "--workdir=w", "--distributed=off"])
def test_flags_of_a_run_are_none_of_its_sub_commands(flag, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["rl", flag, "rescore", "--run=w"])
    assert (
        exit.value.code == 2
        and f"{flag.partition('=')[0]} is for a run of rl" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        cli.main(["rl", "rescore", "--run=w", "--config.steps=3"])
    assert "unrecognized argument: --config.steps=3" in capsys.readouterr().err


def test_a_server_has_the_rewards_and_limits_that_are_named(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "blip3o_jax.rl.rewards.server.serve",
        lambda *where, **options: seen.append((where, options)),
    )
    arguments = [
        "--reward=shapes",
        "--port=9",
        "--batch=3",
        "--score_timeout=7",
        "--max_body_mb=2",
        "--metrics_port=10",
    ]
    assert cli.main(["rl", "serve-rewards", *arguments]) == 0
    ((rewards, host, port), options) = seen[0]
    assert ([reward.name for reward in rewards], host, port) == (["shapes"], "127.0.0.1", 9)
    limits = options.pop("limits")
    assert (limits.batch, limits.score_seconds, limits.max_body, limits.max_memory) == (
        3,
        7,
        2 << 20,
        4 << 30,
    )
    assert options == {"token_env": "", "metrics_host": "127.0.0.1", "metrics_port": 10}
