"""Choose the strategy and the mesh of a run where its settings leave them open.

    slices      as many as the devices have
    strategy    fsdp; hybrid over several slices; fsdp_sp where a micro-batch has fewer rows than
                there are devices
    tensor      2 for fsdp_tp, else 1
    sequence    2 for fsdp_sp, or the devices of a row; else 1
    fsdp        the most devices of a slice that divide every sharded width, and that leave a device
                TILE columns of the widths of large networks; 1 for dp
    data        the rest

Every field of `MeshConfig` that is set stays as it is.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

from blip3o_jax.config import MeshConfig

# A TPU's memory holds arrays in tiles this wide. Of pieces that are narrower, the compiler does not
# gather the whole: it adds up arrays of the full size, at twice the traffic and more (1.7B on 64
# chips, 32 columns each: 212 of them a step).
TILE = 128
# More devices a row spend their time on exchanging keys and values.
MAX_SEQUENCE = 8
# Widths that at least this fraction of the parameters has are those of large networks.
MIN_FRACTION = 1 / 5


def plan_mesh(
    cfg: MeshConfig,
    devices: int,
    *,
    slices: int = 1,
    widths: Callable[[], Mapping[int, int]] = dict,
    rows: int = 0,
) -> MeshConfig:
    """Return `cfg` with a value in every field.

    Args:
      cfg: the mesh as far as it is set.
      devices: of all slices together.
      slices: that the devices lie in; a set `cfg.slices` comes first.
      widths: returns {dimension of parameters that lies over `fsdp`: how many parameters have it};
        called only if the choice depends on it.
      rows: of a micro-batch of the whole mesh; 0: not known, as in sampling.
    """
    cfg = plan_groups(cfg, devices, slices=slices, rows=rows)
    if cfg.data and cfg.fsdp:
        return cfg
    if -1 in (cfg.tensor, cfg.sequence, cfg.fsdp):
        # One axis takes what is left, so that the others have the least that they can have.
        return dataclasses.replace(cfg, data=cfg.data or cfg.slices, fsdp=cfg.fsdp or 1)
    if cfg.fsdp or cfg.strategy.removeprefix("hybrid_") == "dp":
        return dataclasses.replace(cfg, data=cfg.data or -1, fsdp=cfg.fsdp or 1)
    if cfg.data:
        return dataclasses.replace(cfg, fsdp=1 if cfg.data == -1 else -1)
    groups = cfg.slices * cfg.tensor * cfg.sequence
    within_slice = devices // groups
    if devices % groups:  # an error of the mesh, which names what was set
        return dataclasses.replace(cfg, data=cfg.slices, fsdp=-1)
    shards = _max_shards(within_slice, widths()) if within_slice > 1 else 1
    return dataclasses.replace(cfg, data=-1, fsdp=shards)


def plan_groups(cfg: MeshConfig, devices: int, *, slices: int = 1, rows: int = 0) -> MeshConfig:
    """Return `cfg` with slices, strategy, and the numbers of devices that share a tensor or a row,
    as `plan_mesh` chooses them; `data` and `fsdp` may still be open.
    """
    slices = cfg.slices or slices
    strategy = cfg.strategy
    sequence = cfg.sequence
    if strategy == "auto":
        strategy = "hybrid" if slices > 1 else "fsdp"
        free = cfg.data < 1 and cfg.fsdp < 1 and cfg.sequence < 2
        few = 0 < rows < devices and cfg.tensor < 2 and free
        each = devices // math.gcd(devices, rows) if few else 1
        # Rows and latents have power-of-two lengths; a row lies within a slice.
        divides = each & (each - 1) == 0 and devices % (slices * each) == 0
        if 1 < each <= MAX_SEQUENCE and divides:
            strategy = "hybrid_fsdp_sp" if slices > 1 else "fsdp_sp"
            sequence = sequence or each
        elif cfg.tensor > 1 or cfg.tensor == -1:
            strategy = "hybrid_fsdp_tp" if slices > 1 else "fsdp_tp"
        elif cfg.sequence > 1 or cfg.sequence == -1:
            strategy = "hybrid_fsdp_sp" if slices > 1 else "fsdp_sp"
    return dataclasses.replace(
        cfg,
        slices=slices,
        strategy=strategy,
        # With an MLP of three times the width more than two or three chips spend their time
        # exchanging (jax-ml/scaling-book, "training").
        tensor=cfg.tensor or (2 if strategy.endswith("fsdp_tp") else 1),
        sequence=sequence or (2 if strategy.endswith("fsdp_sp") else 1),
    )


def _max_shards(devices: int, widths: Mapping[int, int]) -> int:
    """Return the most shards of `widths` over `devices`: a divisor of all of them."""
    if not widths:
        return devices
    common = math.gcd(devices, *widths)
    # Small networks have little to gather, in pieces of any size.
    total = sum(widths.values())
    large = [width for width, count in widths.items() if count >= MIN_FRACTION * total]
    narrowest = min(large or widths)
    divisors = [number for number in range(1, common + 1) if common % number == 0]
    # A width of less than two tiles cannot be sharded in tiles: then memory decides, not the time.
    narrow = narrowest < 2 * TILE
    whole = [number for number in divisors if narrow or narrowest // number >= TILE]
    return max(whole, default=1)
