"""Strip the prefixes of wrappers (DDP, torch.compile, PEFT) from tensors' names.

`torch.compile` adds `_orig_mod.`, FSDP and activation checkpointing `_fsdp_wrapped_module.` and
`_checkpoint_wrapped_module.`, data parallelism `module.`, PEFT `base_model.model.`. They can wrap
the whole model or a part of it, and each other.
"""

from collections.abc import Iterable, Sequence

from blip3o_jax.config import UserError

# No module of a model has these names: they are removed at any depth.
ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Common words: removed only if every name, or every name of a part, begins with them.
LEADING = ("module.", "base_model.model.")
_UNMERGED = (
    ".lora_A.",
    ".lora_B.",
    ".lora_embedding_A",
    ".base_layer.",
    ".lora_magnitude_vector",
    ".modules_to_save.",
)


def unwrapped_names(
    names: Iterable[str], prefixes: Sequence[str] = (), where: str = ""
) -> dict[str, str]:
    """Return {name: name without wrappers}, in order.

    `prefixes` are those of parts that may be wrapped separately. Raises UserError, beginning with
    `where`, for unmerged low-rank factors, and for two names that become one.
    """
    names = list(names)
    if unmerged := next(
        (name for name in names if any(mark in f".{name}" for mark in _UNMERGED)), None
    ):
        raise UserError(
            f"{where} holds an adapter that is not merged ({unmerged}): merge it first (peft: "
            "merge_and_unload, save_pretrained)"
        )
    plain = {
        name: ".".join(piece for piece in name.split(".") if piece not in ANYWHERE)
        for name in names
    }
    for part in ("", *sorted(prefixes, key=len, reverse=True)):
        plain = _without_leading(plain, part)
    seen: dict[str, str] = {}
    for name, short in plain.items():
        if short in seen:
            raise UserError(
                f"{where} holds {seen[short]} and {name}, which are one tensor: save the model "
                "once, unwrapped"
            )
        seen[short] = name
    return plain


def _without_leading(plain: dict[str, str], part: str) -> dict[str, str]:
    """Remove LEADING prefixes that all names of a part share, repeatedly."""
    own = {
        name: short.removeprefix(part) for name, short in plain.items() if short.startswith(part)
    }
    while own and (
        lead := next(
            (x for x in LEADING if all(short.startswith(x) for short in own.values())), None
        )
    ):
        own = {name: short.removeprefix(lead) for name, short in own.items()}
    return plain | {name: part + short for name, short in own.items()}
