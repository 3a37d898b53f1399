"""The prompts of a run: drawn in an order that depends on nothing but the seed, and made rows of
tokens.
"""

import numpy as np

from blip3o_jax.config import Config, UserError
from blip3o_jax.data.prompts import Prompt
from blip3o_jax.data.sequence import text_to_image_prompt
from blip3o_jax.sampling_programs import LENGTH_BUCKET
from blip3o_jax.text.vocabulary import Vocabulary


def prompt_indices(count: int, rollout: int, prompts_per_rollout: int, seed: int) -> np.ndarray:
    """Which of `count` prompts rollout number `rollout` draws, int64 [prompts_per_rollout]: the
    next piece of an endless row of all prompts in a random order, then all in another, and so on.
    Nothing need be kept to go on with it.
    """
    positions = rollout * prompts_per_rollout + np.arange(prompts_per_rollout)
    epochs, places = np.divmod(positions, count)
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(count)
        for epoch in np.unique(epochs).tolist()
    }
    return np.array(
        [
            orders[epoch][place]
            for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)
        ]
    )


class PromptRows:
    """Prompts as rows of tokens, of all `prompts` the longest, so that one program serves them all.
    UserError for one that does not fit in a row beside its image.
    """

    def __init__(self, prompts: list[Prompt], config: Config, vocabulary: Vocabulary):
        self._config, self._vocabulary = config, vocabulary
        most = config.data.max_length - config.model.tokenizer.num_tokens
        longest = max(prompts, key=lambda prompt: len(self._ids(prompt)))
        length = len(self._ids(longest))
        if length > most:
            raise UserError(
                f"rl.prompts_file: prompt {longest.text[:60]!r} has {length} tokens; data.max_length={config.data.max_length} "
                f"leaves {most} beside the image's: shorten it, or raise data.max_length"
            )
        self.length = min(-(-length // LENGTH_BUCKET) * LENGTH_BUCKET, most)

    def of(self, prompts: list[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [P, L], padded on the right, lengths [P]), int32."""
        tokens_PL, lengths_P = (
            np.zeros((len(prompts), self.length), np.int32),
            np.zeros(len(prompts), np.int32),
        )
        for row, prompt in enumerate(prompts):
            ids = self._ids(prompt)
            tokens_PL[row, : len(ids)], lengths_P[row] = ids, len(ids)
        return tokens_PL, lengths_P

    def _ids(self, prompt: Prompt) -> list[int]:
        model = self._config.model
        return text_to_image_prompt(
            self._vocabulary, model.template, prompt.text, model.tokenizer.pool_scale
        )
