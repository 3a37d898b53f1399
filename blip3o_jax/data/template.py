"""Fill in the published chat template: the turns of user and assistant for each task.

    task         user's turn, `template.*`        the assistant answers with
    t2i          generate, {caption}              an image
    edit         edit, {instruction}              an image; edit_several for several references
    reconstruct  reconstruct                      an image
    understand   understand, {question}           text

`<image>` in a template becomes, for each reference image, <|vision_start|>, n placeholders and
<|vision_end|>. The user's text is encoded as text, even where it spells a tag.
"""

from typing import NamedTuple

from blip3o_jax.config import TemplateConfig, UserError, check, check_choice
from blip3o_jax.text.tokenizers import VISION_END, VISION_START
from blip3o_jax.text.vocabulary import Vocabulary

TASKS = ("t2i", "edit", "reconstruct", "understand")
IMAGE = "<image>"


class PromptTokens(NamedTuple):
    """Hold the ids up to the beginning of the answer, and for each reference image the index of its
    opening tag; the n positions after it hold <I0>.
    """

    ids: list[int]
    references: list[int]


def make_prompt(
    vocab: Vocabulary,
    template: TemplateConfig,
    task: str,
    text: str,
    *,
    references: int = 0,
    num_image_tokens: int = 0,
    pool_scale: int = 1,
) -> PromptTokens:
    """Return the prompt of a task: `text` is the caption, instruction or question, `references` the
    number of reference images. If the answer is an image the prompt ends with its scale token.
    Raises UserError for a text or a number of images that does not fit the task.
    """
    before, after = _fill_template(template, task, text, references)
    system = _turn(vocab, "system", template.system) if template.system else []
    if task == "t2i":
        user = _turn(vocab, "user", before)
        openings = []
    else:
        start = vocab.tokenizer.special(VISION_START)
        end = vocab.tokenizer.special(VISION_END)
        # <I0> is a placeholder: `rows.insert_references` writes the codes on the devices.
        image = [start, *[vocab.image_token_offset] * num_image_tokens, end]
        head = [vocab.start_of_turn, *vocab.encode(f"user\n{before}")]
        user = [
            *head,
            *image * references,
            *vocab.encode(after),
            vocab.end_of_turn,
            *vocab.encode("\n"),
        ]
        openings = [len(system) + len(head) + i * len(image) for i in range(references)]
    opening = [vocab.start_of_turn, *vocab.encode("assistant\n")]
    if task != "understand":
        opening += [vocab.image_start, vocab.scale(pool_scale)]
    return PromptTokens([*system, *user, *opening], openings)


def _fill_template(
    template: TemplateConfig, task: str, text: str, references: int
) -> tuple[str, str]:
    """Return a task's template with `text` in it, as the parts before and after the images."""
    check_choice("task", task, TASKS)
    field, place = {
        "t2i": ("generate", "{caption}"),
        "edit": ("edit" if references == 1 else "edit_several", "{instruction}"),
        "reconstruct": ("reconstruct", ""),
        "understand": ("understand", "{question}"),
    }[task]
    template_text = getattr(template, field)
    if task == "t2i":
        check(not references, "task t2i shows no image: give an instruction or a question with it")
        return template_text.replace(place, text), ""
    if not references:
        raise UserError(f"task {task} needs an image: give at least one")
    if place and not text.strip():
        raise UserError(f"task {task} needs words: the {place.strip('{}')} is empty")
    before, after = (
        half.replace("{count}", str(references)) for half in template_text.split(IMAGE)
    )
    return (before.replace(place, text), after.replace(place, text)) if place else (before, after)


def _turn(vocab: Vocabulary, role: str, text: str) -> list[int]:
    return [
        vocab.start_of_turn,
        *vocab.encode(f"{role}\n{text}"),
        vocab.end_of_turn,
        *vocab.encode("\n"),
    ]
