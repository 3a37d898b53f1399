"""Load a source's weights into stock PyTorch modules with PyTorch's own loaders.

A directory that a stock class saved is loaded by `from_pretrained`; other files that transformers
finds are loaded by `safetensors` and `torch.load`. tensor_files.py and weight_files.py do not read
weights here, so that an error in them shows in a comparison. Modules are built from the files'
config.json if there is one. Needs the extra [convert].
"""

import contextlib
import dataclasses
import functools
import json
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
from blip3o_jax.convert.conversions import conversion_of, known_prefixes, prefix_of
from blip3o_jax.convert.source import TorchSource
from blip3o_jax.convert.source_files import WeightSource
from blip3o_jax.convert.tables import EMBEDDINGS, HEAD
from blip3o_jax.part_registry import resolve, settings_of


def load_torch(source: TorchSource, parts: Sequence[str]) -> torch_model.Blip3o:
    """Return the stock modules of `parts` with the files' weights, in float32.

    Raises UserError when the libraries do not load them, or load other tensors than the class has.
    """
    cfg = source.config.model
    rows = source.tensors["ar"][EMBEDDINGS].shape[0] if "ar" in parts else cfg.ar.vocab_size
    cfg = dataclasses.replace(cfg, ar=dataclasses.replace(cfg.ar, vocab_size=rows, spare_rows=0))
    return torch_model.Blip3o(cfg, {part: _load_part(part, cfg, source) for part in parts})


def _load_part(part: str, cfg: ModelConfig, source: TorchSource) -> torch.nn.Module:
    module: torch.nn.Module | None = None
    missing: set[str] = set()
    conversion = conversion_of(part, cfg)
    with _silence_warnings():
        for weight_source in source.weight_sources:
            if weight_source.prefix not in ("", conversion.prefix):
                continue
            if weight_source.library == "diffusers":
                module, missing = _from_diffusers(part, weight_source, source)
            elif conversion.library == "transformers" and not weight_source.is_wrapped:
                module, missing = _from_transformers(part, weight_source, source)
            else:
                if module is None:
                    module = torch_model.part(part, cfg)
                    missing = set(module.state_dict())
                tied = part == "ar" and cfg.ar.tie_word_embeddings
                missing -= _fill(
                    module, _state(part, weight_source, source), weight_source, tied=tied
                )
    # Buffers are computed by the stock class, and need not be in the files.
    missing -= set(conversion.buffers(settings_of(part, cfg)))
    if module is None or missing:
        raise UserError(
            f"{source.weight_sources[-1].path}: PyTorch finds no "
            f"{conversion.prefix}{min(missing, default='*')} there"
        )
    # float32, so that outputs can be compared to 1e-5 whatever the files' dtype.
    return module.float().eval()


def _from_transformers(
    part: str, weight_source: WeightSource, source: TorchSource
) -> tuple[torch.nn.Module, set[str]]:
    """Load a language model; a BLIP3o-NEXT directory also holds the other parts' tensors."""
    cls = _stock_class(part, source)
    config = cls.config_class.from_json_file(weight_source.path / "config.json")
    return _from_pretrained(
        weight_source,
        lambda **options: cls.from_pretrained(
            weight_source.path,
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            **options,
        ),
    )


def _stock_class(part: str, source: TorchSource) -> Any:
    return resolve(conversion_of(part, source.config.model).torch_class)


def _from_diffusers(
    part: str, weight_source: WeightSource, source: TorchSource
) -> tuple[torch.nn.Module, set[str]]:
    """Return a part and the names of its missing tensors.

    All are missing for a directory with a configuration only. Wrapped names, which
    `from_pretrained` does not support, are loaded without their wrappers.
    """
    cls = _stock_class(part, source)
    if weight_source.weights is None or weight_source.is_wrapped:
        module = cls.from_config(cls.load_config(weight_source.path, local_files_only=True))
        missing = set(module.state_dict())
        if weight_source.is_wrapped:
            state = _state(part, weight_source, source)
            missing -= _fill(module, state, weight_source, tied=False)
        return module, missing
    return _from_pretrained(
        weight_source,
        lambda **options: cls.from_pretrained(
            weight_source.path, torch_dtype=torch.float32, **options
        ),
    )


def _from_pretrained(
    weight_source: WeightSource, load: Callable[..., Any]
) -> tuple[torch.nn.Module, set[str]]:
    """Return the module that a stock class loads and the names that its files lack.

    The class ties a missing tied head itself.
    """
    assert weight_source.weights is not None  # the caller handles a configuration alone
    try:
        module, info = load(
            variant=weight_source.weights.variant or None,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # OSError, ValueError, RuntimeError, KeyError, SafetensorError, ...
        raise UserError(
            f"{weight_source.path}: PyTorch's loader refuses it: {first_line(error)[:300]}"
        ) from error
    if mismatched := [*info["mismatched_keys"], *info.get("error_msgs", ())]:
        line = first_line(RuntimeError(mismatched[0]))[:300]
        raise UserError(f"{weight_source.path}: PyTorch's loader refuses {line}")
    return module, set(info["missing_keys"])


def _state(
    part: str, weight_source: WeightSource, source: TorchSource
) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a part by the stock module's names; other parts are skipped."""
    own = prefix_of(part, source.config.model)
    prefix = own.removeprefix(weight_source.prefix)
    # Names of other parts begin with the empty prefix too.
    others = tuple(p for p in known_prefixes() if p.startswith(prefix) and p != own)
    if weight_source.prefix:
        others = ()
    unread = {key.removeprefix(weight_source.prefix) for key in source.unread}
    state = {}
    for name, read in _tensors(part, weight_source, source):
        short = weight_source.unwrapped.get(name, name)
        if short.startswith(prefix) and short not in unread and not short.startswith(others):
            state[source.record.table_key(part, short.removeprefix(prefix))] = read()
    return state


def _tensors(
    part: str, weight_source: WeightSource, source: TorchSource
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yield (name, function that reads the tensor) of the files that the library finds."""
    own_file = conversion_of(part, source.config.model).file
    for file in _files(weight_source):
        if file.suffix != ".safetensors":
            if own_file is not None and weight_source.library == "":
                state = own_file.torch_state(file)
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
            yield from ((name, functools.partial(_identity, x)) for name, x in state.items())
            continue
        with safetensors.safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (`opened` is not iterable)
                yield name, functools.partial(opened.get_tensor, name)


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _files(weight_source: WeightSource) -> list[pathlib.Path]:
    """Return the given file, or those that the library reads in a directory."""
    if weight_source.path.is_file():
        return [weight_source.path]
    assert weight_source.weights is not None  # a configuration alone has no tensors to read
    if weight_source.library == "diffusers":  # the index or single file of `find_weights`
        found = weight_source.weights.file
        if not weight_source.weights.is_index:
            return [found]
        names = json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()
        return [found.with_name(name) for name in sorted(set(names))]
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    config = weight_source.path / "config.json"
    named = transformers.PreTrainedConfig.from_json_file(config) if config.is_file() else None
    try:
        files, _ = _get_resolved_checkpoint_files(
            weight_source.path,
            variant=weight_source.weights.variant or None,
            gguf_file=None,
            use_safetensors=None,
            user_agent=None,
            is_remote_code=False,
            transformers_explicit_filename=getattr(named, "transformers_weights", None),
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{weight_source.path}: transformers finds no weights: {first_line(error)[:300]}"
        ) from error
    return [pathlib.Path(file) for file in files or ()]


def _fill(
    module: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    weight_source: WeightSource,
    *,
    tied: bool,
) -> set[str]:
    """Load `state` into a module and return its names; UserError for an unknown name."""
    state = dict(state) | ({HEAD: state[EMBEDDINGS]} if tied and EMBEDDINGS in state else {})
    try:
        found = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # another shape
        raise UserError(
            f"{weight_source.path}: PyTorch does not load it: {first_line(error)[:300]}"
        ) from error
    if found.unexpected_keys:
        raise UserError(f"{weight_source.path}: PyTorch's class has no {found.unexpected_keys[0]}")
    return set(state)


@contextlib.contextmanager
def _silence_warnings() -> Iterator[None]:
    """Silence the libraries' progress bars and warnings on other parts' tensors and old keys."""
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
