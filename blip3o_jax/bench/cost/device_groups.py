"""Parse the devices of a collective: its replica groups, or pairs of source and target."""

import functools
import math
import re

import numpy as np


@functools.cache
def replica_groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Return the device numbers of each group.

    XLA writes them in these forms:

    {{0,1},{2,3}}     listed
    [2,2]<=[4]        0 .. 3 in rows of two
    [2,2]<=[2,2]T(1,0)  the same numbers as an array, transposed first
    {}                all devices are one group
    mesh['a'=2,'b'=4] {'a'}   along axis a of the numbers as an array a x b
    mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}   the numbers as an array 2 x 4, transposed,
                                                        then a x b
    """
    if text.strip("{} ") == "":
        return (tuple(range(devices)),)
    if text.startswith("{"):
        return tuple(
            tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d, ]+)\}", text)
        )
    if text.startswith("mesh["):
        return _mesh_groups(text)
    found = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text.strip())
    if not found:
        raise ValueError(f"replica_groups={text!r} is in no form that is known here")
    shape, *order = (tuple(map(int, part.split(","))) for part in found.groups() if part)
    return _rows(_numbered(*order).reshape(shape[0], -1))


_MESH_GROUPS = re.compile(
    r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}"
)


def _mesh_groups(text: str) -> tuple[tuple[int, ...], ...]:
    unknown = ValueError(f"replica_groups={text!r} is in no form that is known here")
    found = _MESH_GROUPS.fullmatch(text.strip())
    if found is None:
        raise unknown
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
    axes = re.findall(r"'([^']*)'", found[4])
    if not sizes or not set(axes) <= set(sizes):
        raise unknown
    shape = tuple(sizes.values())
    order = [tuple(map(int, part.split(","))) for part in (found[2], found[3]) if part]
    ids = _numbered(*(order or [shape])).reshape(shape)
    along = [list(sizes).index(axis) for axis in axes]
    others = [i for i in range(len(shape)) if i not in along]
    return _rows(ids.transpose(others + along).reshape(-1, math.prod(shape[i] for i in along)))


def _numbered(shape: tuple[int, ...], order: tuple[int, ...] | None = None) -> np.ndarray:
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(order) if order else ids


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, row)) for row in ids)


@functools.cache
def device_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Parse source_target_pairs={{0,1},{1,2}}."""
    return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", text))
