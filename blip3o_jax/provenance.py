"""State what produced a measured result: the command, the date and the versions."""

import datetime
import platform
from importlib import metadata
from typing import Any

# What compiles and runs the programs, and what the other side of a comparison runs.
PACKAGES = (
    "blip3o_jax",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "torch",
    "transformers",
    "diffusers",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def provenance(command: str) -> dict[str, Any]:
    """Return {"command", "date", "versions"}, the first entries of a report on a measurement."""
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"command": command, "date": date, "versions": versions()}
