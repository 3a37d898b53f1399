"""Find the paths of shards from glob and brace patterns and directories, and check that each is a
file.
"""

import concurrent.futures
import glob
import itertools
import os
import re
from collections.abc import Iterable, Sequence

from blip3o_jax import files
from blip3o_jax.config import UserError
from blip3o_jax.data.index_builder import THREADS
from blip3o_jax.files import raise_trouble

MAX_FILES = 10**6  # files that a pattern may expand to


def expand_pattern(path: str) -> list[str]:
    """Return the existing paths that a pattern stands for. Raises UserError if there are none."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", path)
    if len(parts) > 1:
        spans = _number_ranges(path, list(zip(parts[1::3], parts[2::3], strict=True)))
        files = [
            "".join(itertools.chain(*zip(parts[::3], (*numbers, ""), strict=True)))
            for numbers in itertools.product(*spans)
        ]
    # A path that exists is itself, even with brackets in its name.
    elif glob.has_magic(path) and not os.path.exists(path):
        files = sorted(glob.glob(path)) or [path]
    else:
        files = [path]
    for file in files:
        if not os.path.exists(file):
            raise UserError(
                f"{file}: no such file or directory; check data.path (a mounted bucket works, a URL"
                " does not)"
            )
    return files


def _number_ranges(path: str, ends: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Return the numbers of each range of a pattern as they are written; `ends`: its first and
    last.
    """
    count = 1
    for low, high in ends:
        if int(high) < int(low):
            hint = f"write {{{high}..{low}}}"
            raise UserError(f"{path}: the range {{{low}..{high}}} is empty: {hint}")
        count *= int(high) - int(low) + 1
    if count > MAX_FILES:
        hint = "name the shards that are there"
        raise UserError(f"{path}: stands for more than {MAX_FILES} files: {hint}")
    return [[f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)] for low, high in ends]


def list_shards(path: str, files: list[str], suffix: str) -> list[str]:
    found = itertools.chain(
        *(
            sorted(glob.glob(os.path.join(f, f"*{suffix}"))) if os.path.isdir(f) else [f]
            for f in files
        )
    )
    files = list(found)
    if not files:
        raise UserError(f"{path}: the data set is empty; there is no *{suffix} file in it")
    check_shards(files)
    return files


def check_shards(paths: Iterable[str]) -> None:
    """Raise UserError where one of the shards is no regular file."""

    def check(path: str) -> None:
        try:
            files.check_regular(path)
        except OSError as error:
            raise_trouble(error)
            raise UserError(f"{path}: the shard cannot be read: {error.strerror}") from None

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(check, paths):
            pass
