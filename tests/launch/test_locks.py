"""Check the lock files of launch/locks against setup.py, and who installs by them."""

import ast
import pathlib
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).parent.parent.parent
LOCKS = sorted((ROOT / "launch" / "locks").iterdir())


def setup_arguments():
    """Return the literal arguments of `setup()`."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
    )
    wanted = {"python_requires", "install_requires", "extras_require"}
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in wanted}


SETUP = setup_arguments()
REQUIREMENTS = [
    Requirement(line)
    for lines in (SETUP["install_requires"], *SETUP["extras_require"].values())
    for line in lines
]


def pins(lock):
    """Return the version of each package; refuse a line that is no pin, such as an address."""
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"([a-z0-9-]+)==([\w.]+)", line) for line in lines]
    assert all(found), f"{lock.name}: {lines[found.index(None)]!r} is not NAME==VERSION"
    return {match[1]: Version(match[2]) for match in found}


@pytest.mark.parametrize("lock", LOCKS, ids=[lock.stem for lock in LOCKS])
def test_a_lock_has_a_version_within_the_range_of_every_requirement(lock):
    pinned = pins(lock)
    for requirement in REQUIREMENTS:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{lock.name}: {requirement}, not {version}"
    minor = f"{pinned['jax'].major}.{pinned['jax'].minor}"
    assert lock.name == f"jax-{minor}.txt"
    assert pinned["jax"] == pinned["jaxlib"]
    assert "://" not in lock.read_text()


def test_a_jax_is_admitted_if_there_is_a_lock_of_its_minor_version():
    specifier = next(r.specifier for r in REQUIREMENTS if r.name == "jax")
    admitted = {f"jax-0.{minor}.txt" for minor in range(50) if specifier.contains(f"0.{minor}.0")}
    assert admitted == {lock.name for lock in LOCKS}


def test_image_and_machines_install_by_a_lock():
    dockerfile = (ROOT / "launch" / "Dockerfile").read_text()
    (jax,) = re.findall(r"^ARG JAX=(\S+)$", dockerfile, re.MULTILINE)
    named = re.findall(r"-c (\S+)", dockerfile.replace("$JAX", jax))
    named += re.findall(r"-c (launch/\S+)", (ROOT / "launch" / "tpu_queued.sh").read_text())
    assert len(named) == 2
    assert set(named) <= {f"launch/locks/{lock.name}" for lock in LOCKS}
