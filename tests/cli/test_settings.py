"""Names that only train/ and rl/ know: every command that takes --config refuses wrong ones."""

import pytest

from blip3o_jax import cli

COMMANDS = {
    "demo": (),
    "params": (),
    "train": (),
    "rl": (),
    "bench rl": ("--out=out",),
    "bench conversion": ("--out=out",),
    "bench sharding": ("--out=out", "--topology=v5e:2x2"),
}
REFUSED = {
    "--config.optimizer.name=adamv": "optimizer.name='adamv' is not one of",
    "--config.optimizer.kwargs={'nestrov': True}": "'nestrov' of adamw is not one of",
    "--config.optimizer.schedule.name=cosine": "optimizer.schedule.name='cosine' is not one of",
    "--config.rl.policy=flaw": "rl.policy='flaw' is not one of ar, flow, both; did you mean flow?",
    "--config.rl.rewards=[{'name': 'shpes'}]": "unknown reward 'shpes': did you mean shapes?",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_name_is_refused_before_anything_is_written(command, tmp_path, monkeypatch, capsys):
    """Refuse it in the first stage of a recipe, of which some commands take the last alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.py").write_text(
        "from blip3o_jax.config import Config\n\n"
        "def get_config():\n    return {'first': Config(), 'last': Config()}\n"
    )
    for flag, message in REFUSED.items():
        flag = flag.replace("--config.", "--config.first.")
        argv = [*command.split(), "--config=recipe.py", *COMMANDS[command], flag]
        assert cli.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("blip3o: error: ") and err.count("\n") == 1 and message in err, err
    assert [path.name for path in tmp_path.glob("[!_]*")] == ["recipe.py"]
