"""Check the tensors of a PyTorch source against the tables and the model's settings.

Every check raises UserError of one line, which names file and tensor.
"""

import jax.numpy as jnp
import numpy as np

from blip3o_jax import config as config_lib
from blip3o_jax.config import ModelConfig, UserError
from blip3o_jax.convert.mapping import Group, groups
from blip3o_jax.convert.source_files import Files
from blip3o_jax.convert.tables import EMBEDDINGS, HEAD, PREFIXES
from blip3o_jax.convert.tensor_files import Tensor


def check_buffer(tensor: Tensor, value: np.ndarray) -> None:
    """Raise UserError unless a stored tensor has the value computed from the settings."""
    stored = tensor.read()
    if stored.shape != value.shape or not np.allclose(stored.astype(np.float32), value, atol=1e-2):
        raise UserError(
            f"{tensor.file}: {tensor.key} differs from the values computed from its network's "
            "settings: use the config.json that was saved with the weights"
        )


def check_scale(key: str, tensor: Tensor) -> None:
    """Raise UserError unless a tokenizer's scaling layer maps to [-1, 1].

    It must map pixels from [0, 1] or be the identity, since this package passes pixels in [-1, 1].
    """
    allowed = {"scale_layer.shift": (0.0, 0.5), "scale_layer.scale": (1.0, 0.5)}.get(key)
    if allowed and not any(np.all(tensor.read() == value) for value in allowed):
        raise UserError(
            f"{tensor.file}: {tensor.key} is {tensor.read().reshape(-1).tolist()}, but the vision "
            f"tokenizer takes pixels in [-1, 1]: it must be {' or '.join(map(str, allowed))}"
        )


def check_part(
    part: str,
    model: ModelConfig,
    given: dict[str, Tensor],
    files: Files,
    initialise: tuple[str, ...],
) -> None:
    """Raise UserError unless the files hold exactly the tensors of the part's table."""
    if not given:
        if part in initialise:
            return
        diffusers = "--diffusion=DIR with weights"
        advice = {"dit": diffusers, "vae": diffusers, "tokenizer": "--ta_tok=FILE"}.get(part)
        advice = f"give {advice}" if advice else f"use --initialise={part} to create them"
        raise UserError(
            f"{files.config_file.parent} holds no tensors of part {part} ({PREFIXES[part]}*): "
            f"{files.unknown_prefix(PREFIXES[part]) or advice}{files.unread_files()}"
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
        raise UserError(f"{_sizes(part, files)}: {error}") from error
    if missing := [key for key in shapes if key not in given]:
        behind = files.unknown_prefix(PREFIXES[part] + missing[0])
        raise UserError(
            f"{next(iter(given.values())).file.parent}: {PREFIXES[part]}{missing[0]} is missing "
            f"({len(missing)} tensors of {part} in all), which {_sizes(part, files)} requires"
            f"{'; ' * bool(behind)}{behind}{files.unread_files()}"
        )
    if extra := [tensor for key, tensor in given.items() if key not in shapes]:
        raise UserError(
            f"{extra[0].file}: {extra[0].key} belongs to no parameter of {part} ({len(extra)} "
            f"tensors in all) according to {_sizes(part, files)}: correct the sizes or remove it"
        )
    for key, (shape, group) in shapes.items():
        _check_tensor(part, given[key], shape, group, files, grown="image_embeddings" in initialise)


def _check_tensor(
    part: str, tensor: Tensor, shape: tuple[int, ...], group: Group, files: Files, *, grown: bool
) -> None:
    wanted = shape
    if grown and group.rule.vocabulary:
        wanted = (files.values["vocab_size"], *shape[1:])
    if tensor.shape != wanted:
        raise UserError(
            f"{tensor.file}: {tensor.key} has shape {list(tensor.shape)}, but "
            f"{_sizes(part, files)} makes it {list(wanted)}"
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(
            f"{tensor.file}: {tensor.key} has dtype {tensor.dtype}, which is not floating-point"
        )


def _sizes(part: str, files: Files) -> str:
    """Return the source of a part's sizes, for messages."""
    if part == "tokenizer" and files.ta_tok_config is not None:
        return f"{files.ta_tok_config} (over the published so400m tokenizer)"
    stock = {"vae": files.vae, "latent_connector": files.vae}.get(part, files.transformer)
    if stock is not None and part not in ("ar", "tokenizer"):
        return str(stock[0]) if part in ("dit", "vae") else f"{files.config_file} with {stock[0]}"
    if part == "ar" or files.section:
        return str(files.config_file)
    if part == "tokenizer":
        return "the published so400m tokenizer (--ta_tok_config=FILE.json states another)"
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
