"""Parts computed twice, in PyTorch and here, in float32 from the same seeded inputs; and the first
layer where they part.

Needs the extra [convert]. PyTorch's modules are the stock classes, filled by PyTorch's own loaders
(torch_files.py). They run first and are let go of before this package's are read, so that one side
is in memory at a time.

Inputs and outputs are numpy arrays, images and latents as [B, H, W, C]. Legend: B batch, L row
length, N image tokens, T condition tokens, D width, C channels, H W image or latent.
"""

import contextlib
import dataclasses
import functools
import gc
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from blip3o_jax import blip3o, nn
from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config, LossConfig, MeshConfig, ModelConfig
from blip3o_jax.convert import torch_model
from blip3o_jax.convert.report import TOLERANCE, Output, relative_error
from blip3o_jax.convert.source import Source
from blip3o_jax.convert.tables import PREFIXES
from blip3o_jax.dit.sana import Condition
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.text.vocabulary import Vocabulary
from blip3o_jax.train.checkpoint import restore_parts

Arrays = dict[str, np.ndarray]
# The stock classes whose instances are stacked here.
LAYERS = (
    "Qwen3DecoderLayer",
    "SiglipEncoderLayer",
    "Siglip2EncoderLayer",
    "SanaTransformerBlock",
    "ResBlock",
    "EfficientViTBlock",
)
# Small, since weights are what takes time; larger than any kernel, so that every weight has its
# effect.
ROW_LENGTH = 24
LATENT_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Run:
    """One computation, from `inputs` to named outputs on both sides. `real_BL`: where the AR's
    arrays mean anything.
    """

    inputs: Arrays
    torch: Callable[[Any, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    jax: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]
    real_BL: np.ndarray | None = None

    def real(self, x: np.ndarray) -> np.ndarray:
        """Without padding, if `x` [B, L, ...] is of the AR."""
        masked = self.real_BL is not None and x.shape[:2] == self.real_BL.shape
        return x[self.real_BL] if masked else x


class TorchResult(NamedTuple):
    outputs: Arrays
    layers: list[tuple[str, np.ndarray]]  # full names, in the order they ran


def compare(
    path: pathlib.Path,
    config: Config,
    ema: bool,
    parts: Sequence[str],
    runs: Sequence[Run],
    wanted: Sequence[TorchResult],
) -> tuple[Output, ...]:
    """Return what the runs over models of `parts` come to: of the checkpoint at `path`, beside what
    PyTorch's model gave.
    """
    gc.collect()  # PyTorch's model, which the caller has let go of
    graphdef, params = load_jax(path, config, parts, ema=ema)
    with jax.default_matmul_precision("highest"):
        return tuple(
            output
            for run, want in zip(runs, wanted, strict=True)
            for output in _compare(run, want, functools.partial(nnx.merge, graphdef), params)
        )


def load_jax(
    path: pathlib.Path, config: Config, parts: Sequence[str], *, ema: bool
) -> tuple[Any, Any]:
    """(graphdef, parameters) of a model of `parts` on one device, computing in float32 with
    parameters cast to it.
    """
    strategy = Strategy.of(MeshConfig(fsdp=1, strategy="dp"), jax.devices()[:1])
    params = restore_parts(path, strategy, tuple(parts), ema=ema)
    leaves, tree = jax.tree.flatten(params)
    del params
    for i in range(len(leaves)):  # one by one, so that no more than one is there twice
        leaves[i] = leaves[i].astype(jnp.float32)
    cfg = in_float32(config.model)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Blip3o(cfg, parts, seed=0)))
    return graphdef, jax.tree.unflatten(tree, leaves)


def in_float32(cfg: Any) -> Any:
    """A configuration with every dtype in it float32."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in ("dtype", "param_dtype"):
            changes[field.name] = "float32"
        elif dataclasses.is_dataclass(value):
            changes[field.name] = in_float32(value)
    return dataclasses.replace(cfg, **changes)


def runs(part: str, source: Source, seed: int) -> list[Run]:
    """The computations that a part is compared in; their inputs depend on the seed and the part
    alone.
    """
    cfg, rng = source.config.model, np.random.default_rng([seed, list(PREFIXES).index(part)])
    if part == "ar":
        return [_ar_run(cfg, known_ids(source), rng)]
    if part == "tokenizer":
        return _tokenizer_runs(cfg, rng)
    if part == "dit":
        return [_dit_run(cfg, rng)]
    if part == "vae":
        return _vae_runs(cfg, rng)
    return [_connector_run(part, cfg, rng)]


def known_ids(source: Source) -> int:
    """How many ids have rows on both sides: all, unless the import made those of the image tokens."""
    return (
        source.text_rows
        if "image_embeddings" in source.initialise
        else source.config.model.ar.vocab_size
    )


def _ar_run(cfg: ModelConfig, ids: int, rng: np.random.Generator) -> Run:
    """Three rows: whole, padded on the right, padded on the left."""
    index_L = np.arange(ROW_LENGTH)
    segments_BL = np.stack([index_L >= 0, index_L < ROW_LENGTH - 5, index_L >= 7]).astype(np.int32)
    inputs = {
        "tokens": rng.integers(0, ids, segments_BL.shape, np.int32),
        "segments": segments_BL,
        "positions": np.maximum(segments_BL.cumsum(1) - 1, 0).astype(np.int32),
    }

    def in_torch(model: torch_model.Blip3o, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        hidden_BLD = model.hidden(x["tokens"], x["positions"], x["segments"])
        return {"hidden states": hidden_BLD, "logits": model.ar.lm_head(hidden_BLD)[..., :ids]}

    def in_jax(model: Blip3o, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        hidden_BLD = model.hidden(x["tokens"], x["positions"], x["segments"])
        return {"hidden states": hidden_BLD, "logits": model.ar.logits(hidden_BLD)[..., :ids]}

    return Run(inputs, in_torch, in_jax, segments_BL > 0)


def _connector_run(part: str, cfg: ModelConfig, rng: np.random.Generator) -> Run:
    """Two rows, one of them not kept."""
    width = {"connector": cfg.ar.hidden_size, "latent_connector": cfg.vae.latent_channels}
    d_in = width.get(part, cfg.tokenizer.encoder.hidden_size)
    inputs = {
        "x": _normal(rng, 2, cfg.tokenizer.num_tokens + 1, d_in),
        "keep": np.array([True, False]),
    }
    both = lambda model, x: {"condition": getattr(model, part)(x["x"], x["keep"])}
    return Run(inputs, both, both)


def _tokenizer_runs(cfg: ModelConfig, rng: np.random.Generator) -> list[Run]:
    size, tokens = cfg.tokenizer.encoder.image_size, cfg.tokenizer.num_tokens
    encode = lambda model, x: {
        "features": model.tokenizer.features(x["images"]),
        "indices": model.tokenizer.encode(x["images"]),
    }
    decode = lambda model, x: {"decoded features": model.tokenizer.decode(x["indices"])}
    images = {"images": rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)}
    indices = {"indices": rng.integers(0, cfg.tokenizer.codebook_size, (2, tokens), np.int32)}
    return [Run(images, encode, encode), Run(indices, decode, decode)]


def latent_size(cfg: ModelConfig) -> int:
    """A small side that patches cut evenly."""
    patch = cfg.dit.patch_size
    return max(min(LATENT_SIZE, cfg.dit.sample_size) // patch, 1) * patch


def _dit_run(cfg: ModelConfig, rng: np.random.Generator) -> Run:
    """Two rows, higher than wide, between whole timesteps. Not at great ones: there an angle of the
    time embedding is off by as many roundings of its frequency, in which PyTorch's exp and the
    exact one differ for 2 of 128.
    """
    side, patch = latent_size(cfg), cfg.dit.patch_size
    inputs = {
        "z": _normal(rng, 2, side + patch, side, cfg.dit.in_channels),
        "timestep": np.array([187.4375, 62.8125], np.float32),
        "condition": _normal(rng, 2, cfg.tokenizer.num_tokens + 1, cfg.dit.caption_channels),
    }
    return Run(
        inputs,
        lambda model, x: {"velocity": model.velocity(x["z"], x["timestep"], x["condition"])},
        lambda model, x: {
            "velocity": model.velocity(x["z"], x["timestep"], Condition(x["condition"]))
        },
    )


def _vae_runs(cfg: ModelConfig, rng: np.random.Generator) -> list[Run]:
    """A square image and a wider one; latents that are wider than high."""
    factor, channels = cfg.vae.spatial_compression, cfg.vae.latent_channels

    def encode(width: int) -> Run:
        name = f"encode to 2 x {width}"
        images = {
            "images": rng.uniform(-1, 1, (1, 2 * factor, width * factor, 3)).astype(np.float32)
        }
        return Run(
            images,
            lambda model, x: {name: model.vae.encode(x["images"]).latent},
            lambda model, x: {name: model.vae.encode(x["images"])},
        )

    decode = Run(
        {"latents": _normal(rng, 1, 2, 3, channels)},
        lambda model, x: {"decode 2 x 3": model.vae.decode(x["latents"]).sample},
        lambda model, x: {"decode 2 x 3": model.vae.decode(x["latents"])},
    )
    return [encode(2), encode(3), decode]


def joint_run(source: Source, seed: int) -> Run:
    """The joint losses of a batch with made-up codes and latents, two draws of noise a row; the
    draws are made once.
    """
    cfg, rng = source.config.model, np.random.default_rng([seed, len(PREFIXES)])
    image_token_offset = Vocabulary(
        source.tokenizer, cfg.tokenizer.codebook_size
    ).image_token_offset
    loss = LossConfig(condition_dropout=0.5, flow_draws=2)
    keys_B = jax.random.split(jax.random.key(seed), 2)
    inputs = _joint_batch(cfg, image_token_offset, rng)
    shape = inputs["latents"].shape[1:]
    drawn = jax.jit(blip3o.draw_noise, static_argnums=(1, 2, 3))(keys_B, shape, cfg, loss)
    draws = {
        "noise": drawn.noise.reshape(-1, *shape),
        "sigma": drawn.sigma.reshape(-1),
        "keep": drawn.keep_B,
    }

    def in_torch(model: torch_model.Blip3o, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ce, flow = model.joint_loss(
            x["tokens"],
            x["loss_mask"],
            x["image_span"],
            x["codes"],
            x["latents"],
            x["noise"],
            x["sigma"],
            image_token_offset=image_token_offset,
            keep_B=x["keep"],
            positions_BL=x["positions"],
            segment_ids_BL=x["segment_ids"],
        )
        return {"cross entropy": ce, "flow loss": flow}

    def in_jax(model: Blip3o, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        _, metrics = blip3o.joint_loss(
            model, x, keys_B, loss=loss, image_token_offset=image_token_offset
        )
        return {"cross entropy": metrics["ce"], "flow loss": metrics["flow"]}

    inputs |= {name: np.asarray(x) for name, x in draws.items()}
    return Run(inputs, in_torch, in_jax, inputs["segment_ids"] > 0)


def _joint_batch(cfg: ModelConfig, image_token_offset: int, rng: np.random.Generator) -> Arrays:
    """Two rows as in `data.sequence`: text, scale token, places of the image tokens, two ids of the
    end, padding.
    """
    tokens, side = cfg.tokenizer.num_tokens, latent_size(cfg)
    span_B = np.array([8, 13], np.int32)
    index_L = np.arange(span_B.max() + tokens + 4, dtype=np.int32)
    real_BL = index_L < span_B[:, None] + tokens + 3
    loss_mask_BL = (real_BL & (index_L > span_B[:, None])).astype(np.float32)
    return {
        "tokens": rng.integers(0, image_token_offset, real_BL.shape, np.int32),
        "loss_mask": loss_mask_BL,
        "segment_ids": real_BL.astype(np.int32),
        "positions": np.broadcast_to(index_L, real_BL.shape),
        "image_span": span_B,
        "label_count": np.full(2, loss_mask_BL.sum() / 2, np.float32),
        "codes": rng.integers(0, cfg.tokenizer.codebook_size, (2, tokens), np.int32),
        "latents": _normal(rng, 2, side, side, cfg.vae.latent_channels),
    }


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def run_torch(run: Run, model: torch_model.Blip3o) -> TorchResult:
    inputs = {name: _channels(torch.tensor(x), 3) for name, x in run.inputs.items()}
    inputs = {name: x.long() if x.dtype == torch.int32 else x for name, x in inputs.items()}
    with torch.no_grad(), _layers_of(model) as layers:
        outputs = run.torch(model, inputs)
    return TorchResult({name: _channels(x, -1).numpy() for name, x in outputs.items()}, layers)


def _channels(x: torch.Tensor, place: int) -> torch.Tensor:
    """Images and latents with the channels moved: from the end (3) to dimension 1, or back (-1)."""
    if x.ndim != 4:
        return x
    return x.movedim(3, 1) if place == 3 else x.movedim(1, 3)


@contextlib.contextmanager
def _layers_of(model: torch_model.Blip3o) -> Iterator[list[tuple[str, np.ndarray]]]:
    """The name and output of each of `LAYERS` that runs, as it runs."""
    seen: list[tuple[str, np.ndarray]] = []

    def record(name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        seen.append((name, _channels(output, -1).clone().numpy()))

    handles = [
        module.register_forward_hook(functools.partial(record, PREFIXES[part] + name))
        for part, whole in model.named_children()
        for name, module in whole.named_modules()
        if type(module).__name__ in LAYERS
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _compare(run: Run, want: TorchResult, merge: Callable[[Any], Any], params: Any) -> list[Output]:
    outputs = jax.jit(lambda params, inputs: run.jax(merge(params), inputs))(params, run.inputs)
    found = []
    for name, wanted in want.outputs.items():
        got, wanted = run.real(np.asarray(outputs[name])), run.real(wanted)
        if np.issubdtype(wanted.dtype, np.integer):
            agreement = float(np.mean(got == wanted)) if got.shape == wanted.shape else 0.0
            found.append(Output(name, None, agreement))
        else:
            found.append(Output(name, relative_error(got, wanted)))
    if all(output.ok for output in found):
        return found
    layer, error = _first_apart(run, want.layers, merge, params)
    return [
        o if o.ok else dataclasses.replace(o, first_layer=layer, first_layer_error=error)
        for o in found
    ]


def _first_apart(
    run: Run, layers: list[tuple[str, np.ndarray]], merge: Callable[[Any], Any], params: Any
) -> tuple[str, float | None]:
    """(full name in PyTorch's model, error) of the first layer whose outputs differ, or ("", None)."""

    @jax.jit
    def carries(params: Any, inputs: Any) -> list[nn.LayerCarry]:
        with nn.capture_intermediates() as records:
            run.jax(merge(params), inputs)
        return [record for record in records if record.carry is not None]

    records = carries(params, run.inputs)
    for ours, theirs in zip(
        _stacks(records, [("", r.index) for r in records]), _torch_stacks(layers), strict=True
    ):
        # Layers past the one that a tokenizer reads its features from are run here without effect,
        # and not there.
        for record, (name, wanted) in zip(ours, theirs, strict=False):
            error = relative_error(run.real(np.asarray(record.carry)), run.real(wanted))
            if not error <= TOLERANCE:
                return name, error
    return "", None


def _torch_stacks(layers: list[tuple[str, np.ndarray]]) -> list[list[tuple[str, np.ndarray]]]:
    names = [name.rpartition(".") for name, _ in layers]
    return _stacks(layers, [(stack, int(index)) for stack, _, index in names])


def _stacks(layers: Sequence[Any], places: Sequence[tuple[str, int]]) -> list[list[Any]]:
    """The layers that ran, cut into runs of a stack; of each layer its stack's name and its index
    there.
    """
    found: list[list[Any]] = []
    last = ("", sys.maxsize)
    for layer, place in zip(layers, places, strict=True):
        if place[0] != last[0] or place[1] <= last[1]:
            found.append([])
        found[-1].append(layer)
        last = place
    return found
