"""Settings of the text tokenizer and of the chat template."""

import dataclasses
from typing import Annotated, Literal

from blip3o_jax.config.fields import Bounds, ConfigGroup, Path, Text, check


@dataclasses.dataclass(frozen=True)
class TextConfig(ConfigGroup, path="model.text"):
    """The text tokenizer. `path`: a SentencePiece .model, or Qwen's tokenizer.json (or the
    directory that holds it).

    With `train_size` > 0 and no path, a SentencePiece tokenizer of that many pieces is trained on
    the run's own captions, and `ar.vocab_size` becomes what it and the image tokens come to.
    """

    kind: Literal["bpe", "sentencepiece"] = "bpe"
    path: Path = ""
    train_size: Annotated[int, Bounds(0, 2**20)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not self.train_size or self.kind == "sentencepiece",
            "text.train_size trains a SentencePiece tokenizer: set text.kind=sentencepiece, or text.train_size=0",
        )


@dataclasses.dataclass(frozen=True)
class TemplateConfig(ConfigGroup, path="model.template"):
    """The chat template: what the user says for each task. `<image>` stands where the reference
    images are shown; an empty `system` leaves the system turn out.
    """

    system: Text = "You are a helpful assistant."
    generate: Text = "Please generate image based on the following caption: {caption}"
    edit: Text = (
        "Please edit this image according to the following instruction: {instruction}.\n<image>"
    )
    edit_several: Text = "Please edit these {count} images according to the following instruction: {instruction}.\n<image>"
    reconstruct: Text = "<image>\nPlease reconstruct the given image."
    understand: Text = "<image>\n{question}"
    # The reference also trains on the prompt's own tokens; kept as an option for comparison.
    supervise_prompt: bool = False
