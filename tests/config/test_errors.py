import pathlib

from blip3o_jax.config import errors


def test_an_extra_is_installed_from_the_clone_or_the_wheel(tmp_path, monkeypatch):
    root = pathlib.Path(errors.__file__).parents[2]
    monkeypatch.chdir(root)
    assert errors.install_command("rl") == "pip install -e '.[rl]'"
    monkeypatch.chdir(tmp_path)
    assert errors.install_command("rl") == f"pip install -e '{root}[rl]'"
    installed = tmp_path / "site-packages" / "blip3o_jax" / "config" / "errors.py"
    monkeypatch.setattr(errors, "__file__", str(installed))
    assert errors.install_command("rl") == "pip install 'blip3o_jax[rl]'"
