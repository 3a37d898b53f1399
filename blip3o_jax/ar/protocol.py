"""Define the interface of an autoregressive language model.

B batch, L tokens, N tokens after a prompt, P prompts, D width, V vocabulary rows.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from blip3o_jax import nn
from blip3o_jax.ar.cache import Cache
from blip3o_jax.config import LanguageModelConfig


class LanguageModel(Protocol):
    """Map embeddings to hidden states causally; implementations are `nnx.Module`s.

    Segment ids are int32: a token attends to earlier tokens of its segment; 0 is padding, whose
    hidden states are undefined. Hidden states are those after the final norm, in the compute dtype:
    `logits` projects them, and they are the condition of the diffusion head.
    """

    cfg: LanguageModelConfig
    embedding: Any  # nnx.Param [cfg.padded_vocab_size, D]
    lm_head: nn.Linear | None  # kernel [D, cfg.padded_vocab_size]; None: the table is tied

    def embed(self, tokens_BL: jax.Array) -> jax.Array:
        """Return the embeddings [B, L, D] of ids, in the compute dtype."""
        ...

    def __call__(
        self, x_BLD: jax.Array, positions_BL: jax.Array, segment_ids_BL: jax.Array
    ) -> jax.Array:
        """Return the hidden states [B, L, D] of whole rows.

        Positions, int32, restart at 0 with each segment.
        """
        ...

    def score_with_prefix(
        self,
        x_PLD: jax.Array,
        segment_ids_PL: jax.Array,
        x_BND: jax.Array,
        repeat: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Return the hidden states [P, L, D] of prompts and [B, N, D] of given tokens after them.

        They equal those of `__call__` over B whole rows. `repeat` repeats arrays that lead with P
        for the rows that continue them.
        """
        ...

    def start_decoding(self, batch: int, capacity: int) -> tuple[Cache, Any]:
        """Return an empty cache of `capacity` tokens per row, and the `layers` of `extend`.

        The layers are computed once, before the token loop.
        """
        ...

    def extend(
        self, x_BLD: jax.Array, segment_ids_BL: jax.Array, past: Cache, layers: Any = None
    ) -> tuple[jax.Array, Cache]:
        """Return the hidden states [B, L, D] of every row's next L tokens, and the new cache.

        They equal those of `__call__` over all tokens so far.
        """
        ...

    def head(self, rows: tuple[int, int] | None = None) -> jax.Array:
        """Return the output projection [D, V] as stored, or of ids rows[0] .. rows[1] - 1."""
        ...

    def logits(self, hidden_BLD: jax.Array, rows: tuple[int, int] | None = None) -> jax.Array:
        """Return float32 logits [..., V], with -inf at padding rows."""
        ...
