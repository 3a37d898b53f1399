"""Settings of the text tokenizer and of the chat template."""

import dataclasses
from typing import Annotated, Literal

from blip3o_jax.config.constraints import Bounds, Placeholder
from blip3o_jax.config.errors import check
from blip3o_jax.config.fields import ConfigGroup
from blip3o_jax.config.types import Path, Text


@dataclasses.dataclass(frozen=True)
class TextConfig(ConfigGroup, path="model.text"):
    """Set the text tokenizer. `path`: a SentencePiece .model, or Qwen's tokenizer.json (or its
    directory).

    With `train_size` > 0 and no path, a SentencePiece tokenizer of that many pieces is trained on
    the run's own captions, and `ar.vocab_size` becomes the sum of its pieces and the image tokens.
    """

    kind: Literal["bpe", "sentencepiece"] = "bpe"
    path: Path = ""
    train_size: Annotated[int, Bounds(0, 2**20)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not self.train_size or self.kind == "sentencepiece",
            "model.text.train_size trains a SentencePiece tokenizer: set "
            "model.text.kind=sentencepiece, or model.text.train_size=0",
        )


_CAPTION = Placeholder("{caption}", "the caption")
_INSTRUCTION = Placeholder("{instruction}", "the instruction")
_QUESTION = Placeholder("{question}", "the question")
_IMAGES = Placeholder("<image>", "the block of reference images", once=True)


@dataclasses.dataclass(frozen=True)
class TemplateConfig(ConfigGroup, path="model.template"):
    """Set the chat template: the user's turn for each task. The reference images replace `<image>`;
    an empty `system` leaves the system turn out.
    """

    system: Text = "You are a helpful assistant."
    generate: Annotated[Text, _CAPTION] = (
        "Please generate image based on the following caption: {caption}"
    )
    edit: Annotated[Text, _INSTRUCTION, _IMAGES] = (
        "Please edit this image according to the following instruction: {instruction}.\n<image>"
    )
    edit_several: Annotated[Text, _INSTRUCTION, _IMAGES] = (
        "Please edit these {count} images according to the following instruction: {instruction}."
        "\n<image>"
    )
    reconstruct: Annotated[Text, _IMAGES] = "<image>\nPlease reconstruct the given image."
    understand: Annotated[Text, _QUESTION, _IMAGES] = "<image>\n{question}"
    # The reference also trains on the prompt's own tokens; kept as an option for comparison.
    supervise_prompt: bool = False
