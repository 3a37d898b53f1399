"""Settings of low-rank adapters."""

import dataclasses
from typing import Annotated

from blip3o_jax.config.constraints import Bounds
from blip3o_jax.config.errors import check, check_choice
from blip3o_jax.config.fields import ConfigGroup
from blip3o_jax.config.types import Finite, Text


@dataclasses.dataclass(frozen=True)
class LoraConfig(ConfigGroup, path="lora"):
    """Set low-rank adapters (arXiv 2106.09685) of the kernels of a part's stacked layers: y = x W +
    alpha / rank (x A) B, with A [in, rank] random and B [rank, out] zero at first. They are float32
    for every kernel dtype; `trainable=('.*/lora_.*',)` trains nothing else. `blip3o convert export`
    writes the merged kernels.
    """

    rank: Annotated[int, Bounds(0, 2**14)] = 0
    """Rank of the adapters; 0 has no adapters."""
    alpha: Finite = 32.0
    """Scale of the adapters, which is divided by the rank."""
    targets: tuple[Text, ...] = ()
    """Names of the linear layers that have adapters, some of those of the default."""

    @property
    def scale(self) -> float:
        """Return the factor of A B; 0 where there are no adapters."""
        return self.alpha / self.rank if self.rank else 0.0

    def of(self, name: str) -> "LoraConfig | None":
        """Return the adapter settings of the linear layer `name`; None where it has no adapter."""
        return self if self.rank and name in self.targets else None

    def check(self, part: str, names: tuple[str, ...]) -> None:
        """Raise ConfigError unless `names`, the layers that can have adapters, hold all targets."""
        check(
            bool(self.targets) or not self.rank,
            f"{part}.lora.targets is empty: name some of {', '.join(names)}, or rank 0",
        )
        for name in self.targets:
            check_choice(f"{part}.lora.targets", name, names)
