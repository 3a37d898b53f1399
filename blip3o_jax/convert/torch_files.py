"""The stock PyTorch modules of a source, filled by PyTorch's own loaders: `from_pretrained` where a
directory is one that a stock class saves, else the files that transformers finds, through
`safetensors` and `torch.load`.

Nothing of tensor_files.py and weight_files.py reads a weight here, so that a fault in those shows
in a comparison. Modules are made from the files' own config.json where there is one. Needs the
extra [convert].
"""

import contextlib
import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import diffusers
import safetensors
import torch
import transformers

from blip3o_jax.config import ModelConfig, UserError
from blip3o_jax.config.errors import first_line
from blip3o_jax.convert import torch_model
from blip3o_jax.convert.source import EMBEDDINGS, HEAD, Source
from blip3o_jax.convert.source_files import Place, read_ta_tok_file
from blip3o_jax.convert.tables import PREFIXES

STOCK = {"dit": diffusers.SanaTransformer2DModel, "vae": diffusers.AutoencoderDC}


def load_torch(source: Source, parts: Sequence[str]) -> torch_model.Blip3o:
    """Return the stock modules of `parts` with the weights of the files, in float32. UserError
    where the libraries do not load them, or load other tensors than the class has."""
    cfg = source.config.model
    rows = source.tensors["ar"][EMBEDDINGS].shape[0] if "ar" in parts else cfg.ar.vocab_size
    cfg = dataclasses.replace(cfg, ar=dataclasses.replace(cfg.ar, vocab_size=rows, spare_rows=0))
    return torch_model.Blip3o(cfg, {part: _load_part(part, cfg, source) for part in parts})


def _load_part(part: str, cfg: ModelConfig, source: Source) -> torch.nn.Module:
    module, missing = None, set[str]()
    with _quiet():
        for place in source.places:
            if place.prefix not in ("", PREFIXES[part]):
                continue
            if place.library == "diffusers":
                module, missing = _from_diffusers(part, place)
            elif part == "ar" and not place.is_wrapped:
                module, missing = _from_transformers(place)
            else:
                if module is None:
                    module = torch_model.part(part, cfg)
                    missing = set(module.state_dict())
                tied = part == "ar" and cfg.ar.tie_word_embeddings
                missing -= _fill(module, _state(part, place, source), place, tied=tied)
    if module is None or missing:
        raise UserError(
            f"{source.places[-1].path}: PyTorch finds no {PREFIXES[part]}{min(missing, default='*')} there"
        )
    return module.float().eval()


def _from_transformers(place: Place) -> tuple[torch.nn.Module, set[str]]:
    """The AR, beside which a BLIP3o-NEXT directory holds the other parts' tensors."""
    config = transformers.Qwen3Config.from_json_file(place.path / "config.json")
    return _from_pretrained(
        place,
        lambda **options: transformers.Qwen3ForCausalLM.from_pretrained(
            place.path, config=config, dtype=torch.float32, attn_implementation="sdpa", **options
        ),
    )


def _from_diffusers(part: str, place: Place) -> tuple[torch.nn.Module, set[str]]:
    """A part and the names it still lacks: all, of a directory that holds its configuration
    alone."""
    cls = STOCK[part]
    if place.weights is None:
        module = cls.from_config(cls.load_config(place.path, local_files_only=True))
        return module, set(module.state_dict())
    if place.is_wrapped:
        raise UserError(
            f"{place.weights.file}: diffusers does not load names such as {next(iter(place.plain))}: save the module that is "
            "wrapped, to compare with it"
        )
    return _from_pretrained(
        place,
        lambda **options: cls.from_pretrained(place.path, torch_dtype=torch.float32, **options),
    )


def _from_pretrained(
    place: Place, load: Callable[..., tuple[Any, dict[str, Any]]]
) -> tuple[torch.nn.Module, set[str]]:
    """The module that a stock class loads and the names that its files lack. A tied head that is
    missing is tied there."""
    try:
        module, info = load(
            variant=place.weights.variant or None, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # the libraries raise OSError, ValueError, RuntimeError, KeyError, SafetensorError, ...
        raise UserError(
            f"{place.path}: PyTorch's loader refuses it: {first_line(error)[:300]}"
        ) from error
    if mismatched := [*info["mismatched_keys"], *info.get("error_msgs", ())]:
        line = first_line(RuntimeError(mismatched[0]))[:300]
        raise UserError(f"{place.path}: PyTorch's loader refuses {line}")
    return module, set(info["missing_keys"])


def _state(part: str, place: Place, source: Source) -> Mapping[str, torch.Tensor]:
    """The tensors of a part by the stock module's names, out of files that hold those of others
    too."""
    prefix = PREFIXES[part].removeprefix(place.prefix)
    others = tuple(
        other
        for other in PREFIXES.values()
        if other and other != PREFIXES[part] and not place.prefix
    )
    unread = {key.removeprefix(place.prefix) for key in source.unread}
    state = {}
    for name, read in _tensors(place):
        short = place.plain.get(name, name)
        if (
            short.startswith(prefix)
            and short not in unread
            and not (part == "ar" and short.startswith(others))
        ):
            state[source.record.table_key(part, short.removeprefix(prefix))] = read()
    return state


def _tensors(place: Place) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """The names in the files that the library finds, each with what reads its tensor."""
    for file in _files(place):
        if file.suffix != ".safetensors":
            is_ta_tok = place.prefix == PREFIXES["tokenizer"] and place.library == ""
            state = (
                read_ta_tok_file(file)["sd"]
                if is_ta_tok
                else torch.load(file, map_location="cpu", weights_only=True)
            )
            yield from ((name, lambda tensor=tensor: tensor) for name, tensor in state.items())
            continue
        with safetensors.safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                yield name, lambda name=name, opened=opened: opened.get_tensor(name)


def _files(place: Place) -> list[pathlib.Path]:
    """One file, or those that transformers would read of a directory."""
    if place.path.is_file():
        return [place.path]
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    config = place.path / "config.json"
    named = transformers.PreTrainedConfig.from_json_file(config) if config.is_file() else None
    try:
        files, _ = _get_resolved_checkpoint_files(
            place.path,
            variant=place.weights.variant or None,
            gguf_file=None,
            use_safetensors=None,
            user_agent=None,
            is_remote_code=False,
            transformers_explicit_filename=getattr(named, "transformers_weights", None),
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{place.path}: transformers finds no weights: {first_line(error)[:300]}"
        ) from error
    return [pathlib.Path(file) for file in files]


def _fill(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor], place: Place, *, tied: bool
) -> set[str]:
    """Load `state` into a module and return the names it had. UserError for one that the module
    does not know."""
    state = dict(state) | ({HEAD: state[EMBEDDINGS]} if tied and EMBEDDINGS in state else {})
    try:
        found = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes
        raise UserError(
            f"{place.path}: PyTorch does not load it: {first_line(error)[:300]}"
        ) from error
    if found.unexpected_keys:
        raise UserError(f"{place.path}: PyTorch's class has no {found.unexpected_keys[0]}")
    return set(state)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings, of tensors that other parts own and of old keys, and their
    progress bars."""
    loggers = (transformers.utils.logging, diffusers.utils.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    bars = [logger.is_progress_bar_enabled() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity(50)
        logger.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        for logger, level, bar in zip(loggers, levels, bars, strict=True):
            logger.set_verbosity(level)
            if bar:
                logger.enable_progress_bar()
