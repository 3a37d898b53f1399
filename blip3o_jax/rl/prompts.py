"""Order and tokenize the prompts of a run; the order depends on the seed alone."""

import numpy as np

from blip3o_jax.config import Config, UserError
from blip3o_jax.data.prompts import Prompt
from blip3o_jax.data.sequence import padded_length, padded_prompts, text_to_image_prompt
from blip3o_jax.text.vocabulary import Vocabulary


def prompt_indices(count: int, rollout: int, prompts_per_rollout: int, seed: int) -> np.ndarray:
    """Return the indices of the prompts of rollout number `rollout`, of `count` in all, int64
    [prompts_per_rollout]. Each epoch has all prompts in its own random order; the order is a
    function of (seed, rollout), so no state is stored to resume it.
    """
    positions = rollout * prompts_per_rollout + np.arange(prompts_per_rollout)
    epochs, offsets = np.divmod(positions, count)
    # The orders of the epochs that this rollout covers: two at an epoch's end.
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(count)
        for epoch in np.unique(epochs).tolist()
    }
    return np.array(
        [
            orders[epoch][offset]
            for epoch, offset in zip(epochs.tolist(), offsets.tolist(), strict=True)
        ]
    )


class PromptRows:
    """Tokenize prompts to rows, padded to the longest of all `prompts`: one program serves all.

    Raises UserError for a prompt that does not fit in a row with its image.
    """

    def __init__(self, prompts: list[Prompt], config: Config, vocabulary: Vocabulary):
        self._config = config
        self._vocabulary = vocabulary
        max_length = config.data.max_length - config.model.tokenizer.num_tokens
        longest = max(prompts, key=lambda prompt: len(self._ids(prompt)))
        length = len(self._ids(longest))
        if length > max_length:
            raise UserError(
                f"rl.prompts_file: prompt {longest.text[:60]!r} has {length} tokens; "
                f"data.max_length={config.data.max_length} "
                f"leaves {max_length} next to the image's: shorten it, or raise data.max_length"
            )
        self.length = min(padded_length(length), max_length)

    def tokenize(self, prompts: list[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens [P, L], padded on the right, lengths [P]), int32."""
        return padded_prompts([self._ids(prompt) for prompt in prompts], self.length)

    def _ids(self, prompt: Prompt) -> list[int]:
        model = self._config.model
        return text_to_image_prompt(
            self._vocabulary, model.template, prompt.text, model.tokenizer.pool_scale
        )
