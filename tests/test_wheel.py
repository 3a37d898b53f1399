"""Check the package as it is installed from a wheel, away from the clone."""

import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BUILT_FROM = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "blip3o_jax", "configs")


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the directory of a virtual environment that has the wheel, and this one's
    libraries."""
    place = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, place / "source" / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            (place / "source").mkdir(exist_ok=True)
            shutil.copy(source, place / "source")
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place, place / "source")
    environment = place / "venv"
    venv.create(environment, system_site_packages=True, with_pip=False)
    python = environment / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", *place.glob("*.whl"))
    # A line of a .pth file lies behind the environment's own packages, and brings no further .pth
    # files: not the clone, where this environment has it in editable form.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


@pytest.mark.slow
def test_an_installed_package_has_its_configs(installed, tmp_path):
    """Run the command that users type in a directory without configs/."""
    environment = {"PATH": f"{installed}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    environment["JAX_PLATFORMS"] = "cpu"
    options = {"cwd": tmp_path, "env": environment}
    where = run("python", "-c", "import blip3o_jax; print(blip3o_jax.__file__)", **options)
    assert where.startswith(str(installed))
    out = run("blip3o", "params", "--config=configs/instruct.py:0.6b", **options)
    assert "Parameters, stage joint" in out
    wrong = subprocess.run(
        ["blip3o", "params", "--config=configs/instrct.py"],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )
    assert wrong.returncode == 2
    assert wrong.stderr == (
        "blip3o: error: config file configs/instrct.py does not exist; "
        "did you mean configs/instruct.py?\n"
    )
