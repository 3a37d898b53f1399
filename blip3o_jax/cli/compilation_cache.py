"""Choose the directory that stores compiled programs for the next start."""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import sys

from blip3o_jax import files
from blip3o_jax.config import UserError

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def set_compilation_cache(directory: pathlib.Path | None) -> None:
    """Set JAX's compilation cache to `directory`; None: to what JAX_COMPILATION_CACHE_DIR says,
    else to `compiled/MACHINE` in the user's cache directory. JAX_ENABLE_COMPILATION_CACHE=false
    turns it off.

    The variable is set, not JAX's option, so that this needs no import of JAX and processes that a
    command starts share the directory.
    """
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        os.environ[VARIABLE] = str(directory.absolute())
        # JAX reads the variable when it is imported; a program that has imported it and calls a
        # command keeps its own default.
        if "jax" in sys.modules:
            sys.modules["jax"].config.update("jax_compilation_cache_dir", os.environ[VARIABLE])
    elif VARIABLE not in os.environ:
        # Without a directory that can be written, programs are compiled at every start.
        with contextlib.suppress(UserError):
            os.environ[VARIABLE] = str(files.cache_directory() / "compiled" / _machine())


def _machine() -> str:
    """Return a name for this kind of machine.

    Programs for CPUs use the instructions of the CPU that they were compiled on, which JAX's key of
    a program does not name: on a home that several machines share, one would load programs that it
    cannot execute.
    """
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        lines = platform.processor()
    # "flags" on x86, "Features" on Arm.
    found = re.search(r"^(?:flags|Features)\s*:.*$", lines, re.MULTILINE)
    digest = hashlib.sha256((found.group() if found else lines).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"
