"""Settings of the text tokenizer and of the chat template."""

import dataclasses
from typing import Annotated, Literal

from blip3o_jax.config.constraints import Bounds, Placeholder
from blip3o_jax.config.errors import check
from blip3o_jax.config.fields import ConfigGroup
from blip3o_jax.config.types import Path, Text


@dataclasses.dataclass(frozen=True)
class TextConfig(ConfigGroup, path="model.text"):
    """Set the text tokenizer."""

    kind: Literal["bpe", "sentencepiece"] = "bpe"
    """Kind of tokenizer: `bpe` is that of the Qwen models."""
    path: Path = ""
    """Files of the tokenizer: tokenizer.json or its directory for `bpe`, a .model file for
    `sentencepiece`.
    """
    train_size: Annotated[int, Bounds(0, 2**20)] = 0
    """Pieces of a SentencePiece tokenizer that is trained on the run's own captions where `path` is
    empty; `model.ar.vocab_size` then follows from it. 0 trains none.
    """

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
    """Set the chat template: the user's turn for each task. The reference images replace
    `<image>`.
    """

    system: Text = "You are a helpful assistant."
    """Text of the system turn; `""` leaves that turn out."""
    generate: Annotated[Text, _CAPTION] = (
        "Please generate image based on the following caption: {caption}"
    )
    """User's turn of text to image."""
    edit: Annotated[Text, _INSTRUCTION, _IMAGES] = (
        "Please edit this image according to the following instruction: {instruction}.\n<image>"
    )
    """User's turn of editing with one reference image."""
    edit_several: Annotated[Text, _INSTRUCTION, _IMAGES] = (
        "Please edit these {count} images according to the following instruction: {instruction}."
        "\n<image>"
    )
    """User's turn of editing with several reference images; `{count}` becomes their number."""
    reconstruct: Annotated[Text, _IMAGES] = "<image>\nPlease reconstruct the given image."
    """User's turn of reconstruction (`task="reconstruct"` of `data.sources`)."""
    understand: Annotated[Text, _QUESTION, _IMAGES] = "<image>\n{question}"
    """User's turn of a question about an image."""
    supervise_prompt: bool = False
    """Train on the tokens of the prompt too, as the released code does."""
