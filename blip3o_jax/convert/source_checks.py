"""Check the tensors of a PyTorch source against the tables and the model's settings.

Every check raises UserError of one line, which names file and tensor.
"""

import jax.numpy as jnp
import numpy as np

from blip3o_jax import config as config_lib
from blip3o_jax.config import ModelConfig, UserError
from blip3o_jax.convert.conversions import conversion_of
from blip3o_jax.convert.mapping import groups
from blip3o_jax.convert.source_files import Files
from blip3o_jax.convert.tables import EMBEDDINGS, HEAD
from blip3o_jax.convert.tensor_files import Tensor


def check_buffer(tensor: Tensor, value: np.ndarray) -> None:
    """Raise UserError unless a stored tensor has the value computed from the settings."""
    stored = tensor.read()
    if stored.shape != value.shape or not np.allclose(stored.astype(np.float32), value, atol=1e-2):
        raise UserError(
            f"{tensor.file}: {tensor.key} differs from the values computed from its network's "
            "settings: use the config.json that was saved with the weights"
        )


def check_part(
    part: str,
    model: ModelConfig,
    given: dict[str, Tensor],
    files: Files,
    initialise: tuple[str, ...],
) -> None:
    """Raise UserError unless the files hold exactly the tensors of the part's table."""
    conversion = conversion_of(part, model)
    prefix = conversion.prefix
    sizes = _sizes(part, model, files)
    if not given:
        if part in initialise:
            return
        advice = f"use --initialise={part} to create them"
        if conversion.file is not None:
            advice = f"give {conversion.file.option}"
        elif conversion.library == "diffusers":
            advice = "give --diffusion=DIR with weights"
        raise UserError(
            f"{files.config_file.parent} holds no tensors of part {part} ({prefix}*): "
            f"{files.unknown_prefix(prefix) or advice}{files.unread_files()}"
        )
    if part in initialise:
        raise UserError(
            f"--initialise={part}, but {next(iter(given.values())).file} holds its tensors: remove "
            "the option or the tensors"
        )
    try:
        shapes = {
            key: (shape, group)
            for group in groups(part, model)
            for key, shape in group.tensors.items()
        }
    except config_lib.ConfigError as error:  # invalid sizes
        raise UserError(f"{sizes}: {error}") from error
    if missing := [key for key in shapes if key not in given]:
        behind = files.unknown_prefix(prefix + missing[0])
        raise UserError(
            f"{next(iter(given.values())).file.parent}: {prefix}{missing[0]} is missing "
            f"({len(missing)} tensors of {part} in all), which {sizes} requires"
            f"{'; ' * bool(behind)}{behind}{files.unread_files()}"
        )
    if extra := [tensor for key, tensor in given.items() if key not in shapes]:
        raise UserError(
            f"{extra[0].file}: {extra[0].key} belongs to no parameter of {part} ({len(extra)} "
            f"tensors in all) according to {sizes}: correct the sizes or remove it"
        )
    for key, (shape, group) in shapes.items():
        grown = group.rule.vocabulary and "image_embeddings" in initialise
        wanted = (files.values["vocab_size"], *shape[1:]) if grown else shape
        _check_tensor(given[key], wanted, sizes)


def _check_tensor(tensor: Tensor, wanted: tuple[int, ...], sizes: str) -> None:
    if tensor.shape != wanted:
        raise UserError(
            f"{tensor.file}: {tensor.key} has shape {list(tensor.shape)}, but "
            f"{sizes} makes it {list(wanted)}"
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(
            f"{tensor.file}: {tensor.key} has dtype {tensor.dtype}, which is not floating-point"
        )


def _sizes(part: str, model: ModelConfig, files: Files) -> str:
    """Return the source of a part's sizes, for messages."""
    conversion = conversion_of(part, model)
    own = conversion.file
    if own is not None:
        if files.tokenizer_sizes is not None:
            return f"{files.tokenizer_sizes} (over {own.published})"
        stated = f"{own.published} ({own.sizes_option} states another)"
        return str(files.config_file) if files.section else stated
    if conversion.library == "transformers":
        return str(files.config_file)
    stock = {"vae": files.vae, "latent_connector": files.vae}.get(part, files.transformer)
    if stock is not None:
        own_sizes = conversion.layout is not None
        return str(stock[0]) if own_sizes else f"{files.config_file} with {stock[0]}"
    if files.section:
        return str(files.config_file)
    return f"{files.config_file} with the published sizes (--diffusion=DIR states others)"


def check_tied_head(files: Files, model: ModelConfig) -> None:
    """Raise UserError if a stored head of a tied model differs from the embeddings."""
    head = files.tensors.get(HEAD)
    if head is None or not model.ar.tie_word_embeddings:
        return
    embeddings = files.tensors[EMBEDDINGS]
    same = head.shape == embeddings.shape and head.dtype == embeddings.dtype
    if not same or not _same_values(head.read(), embeddings.read()):
        raise UserError(
            f"{head.file}: {HEAD} differs from {EMBEDDINGS}, but {files.config_file} has "
            "tie_word_embeddings: true; set it to false there, or remove the tensor"
        )


def _same_values(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether the arrays are bitwise equal.

    They are compared in pieces, since a comparison of all of it allocates half their size.
    """
    a, b = (x.reshape(-1).view(np.uint8) for x in (a, b))
    piece = 2**24
    return all(np.array_equal(a[i : i + piece], b[i : i + piece]) for i in range(0, len(a), piece))
