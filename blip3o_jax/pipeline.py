"""What a trained model does, from a checkpoint: `model = blip3o_jax.load(DIR)`.

    model.generate(["a red circle"])                    text -> images
    model.edit([photo], ["make the sky green"])         image(s) and an instruction -> images
    model.redraw([photo])                               image -> its tokens -> image
    model.ask([photo], ["what colour is the sky?"])     image(s) and a question -> text
    model.draw([Request("t2i", ...), Request("edit", ...)])     tasks mixed

Legend: B batch, L prompt length, N image tokens, H W C image or latent, R places for reference images.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.ar.sampling import Drawn, Written, generate_image_tokens, generate_text
from blip3o_jax.blip3o import Blip3o, References, references
from blip3o_jax.config import Config, MeshConfig, ModelConfig, SamplingConfig, UserError, check
from blip3o_jax.data import images
from blip3o_jax.data.sequence import insert_references
from blip3o_jax.data.template import Prompt, make_prompt
from blip3o_jax.dit import sampler
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.samples import write_images
from blip3o_jax.text.tokenizers import load_tokenizer
from blip3o_jax.text.vocabulary import Vocabulary, codes_from_image_ids, image_ids_from_codes
from blip3o_jax.train import checkpoint as checkpoints
from blip3o_jax.train.stages import stage_parts

# Prompts are padded to a multiple of this many tokens, so that few lengths are compiled.
LENGTH_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Request:
    """One thing to do: `text` is the caption, instruction or question, `images` those shown, uint8 [H, W, 3] of any size. What
    is drawn is of `size`, (height, width); None: of the model's sizes that nearest in shape to the first image, or the first.
    """

    task: str  # of data/template.py
    text: str = ""
    images: tuple[np.ndarray, ...] = ()
    size: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Generated:
    """uint8 images [B, H, W, 3], a list of [H, W, 3] where their sizes differ, and the codebook indices [B, N] they were drawn
    from, in the order of the prompts."""

    prompts: list[str]
    images: np.ndarray | list[np.ndarray]
    codes: np.ndarray


class Pipeline:
    """A trained model on a mesh, ready to sample. `params` is {part: nested dict of arrays}."""

    def __init__(self, config: Config, graphdef: Any, params: Any, vocabulary: Vocabulary, strategy: Strategy):
        self.config, self.vocabulary, self.strategy = config, vocabulary, strategy
        self._graphdef, self._params = graphdef, params
        image_ids = vocabulary.image_first, vocabulary.image_last
        self._sample = make_sample(graphdef, strategy, image_ids)
        self._write = make_write(graphdef, strategy, vocabulary)

    def generate(
        self, prompts: Sequence[str], *, seed: int = 0, progress: bool = False, first_index: int = 0, **overrides: Any
    ) -> Generated:
        """One image a prompt; see `draw`."""
        requests = [Request("t2i", prompt) for prompt in prompts]
        return self.draw(requests, seed=seed, progress=progress, first_index=first_index, **overrides)

    def edit(self, images: Sequence[Any], instructions: Sequence[str], **more: Any) -> Generated:
        """One image an instruction. `images` holds for each the image it is about, or a sequence of several; `more` as of
        `draw`."""
        pairs = zip(images, instructions, strict=True)
        return self.draw([Request("edit", text, _several(shown)) for shown, text in pairs], **more)

    def redraw(self, images: Sequence[np.ndarray], **more: Any) -> Generated:
        """Each image as the model draws it again from its tokens; `more` as of `draw`."""
        return self.draw([Request("reconstruct", "", (image,)) for image in images], **more)

    def draw(
        self, requests: Sequence[Request], *, seed: int = 0, progress: bool = False, first_index: int = 0, **overrides: Any
    ) -> Generated:
        """One image a request, of any tasks that an image answers. `overrides` are fields of SamplingConfig (steps, guidance,
        temperature, top_k, ...).

        Image i depends on (seed, first_index + i, requests[i]) and the settings alone, not on the batch it was made in.
        Raises UserError for no request, an unknown setting, or one that does not fit the model's rows.
        """
        settings, began, done = self.settings(**overrides), time.monotonic(), 0
        drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for batch, rows, size in self._batches(requests, seed, first_index, settings, self.config.model.tokenizer.num_tokens):
            pixels_BHWC, codes_BN = self._sample(self._params, **batch, settings=settings, size=size)
            drawn |= dict(zip(rows, zip(np.asarray(pixels_BHWC), np.asarray(codes_BN), strict=True), strict=False))
            done += len(rows)
            if progress:
                seconds = time.monotonic() - began
                left = seconds / done * (len(requests) - done)
                rate = f"{done / seconds:.2f} images/s  ETA {left:.0f} s"
                print(f"sample  {done}/{len(requests)} images  {rate}", file=sys.stderr)
        images = [drawn[i][0] for i in range(len(requests))]
        alike = len({image.shape for image in images}) == 1
        codes_BN = np.stack([drawn[i][1] for i in range(len(requests))])
        return Generated([request.text for request in requests], np.stack(images) if alike else images, codes_BN)

    def ask(
        self,
        images: Sequence[Any],
        questions: Sequence[str],
        *,
        seed: int = 0,
        most: int = 64,
        first_index: int = 0,
        temperature: float = 0.0,
        **overrides: Any,
    ) -> list[str]:
        """The answer to each question, of at most `most` tokens, the likeliest or drawn at a temperature. `images` as of
        `edit`; an answer depends on what an image of `draw` does."""
        settings = self.settings(temperature=temperature, **overrides)
        pairs = zip(images, questions, strict=True)
        requests = [Request("understand", text, _several(shown)) for shown, text in pairs]
        answers: dict[int, str] = {}
        for batch, rows, _ in self._batches(requests, seed, first_index, settings, most):
            ids_BN, count_B = map(np.asarray, self._write(self._params, **batch, settings=settings, most=most))
            answers |= {i: self.vocabulary.decode(ids[:n]).strip() for i, ids, n in zip(rows, ids_BN, count_B, strict=False)}
        return [answers[i] for i in range(len(requests))]

    def _batches(
        self, requests: Sequence[Request], seed: int, first_index: int, settings: SamplingConfig, room: int
    ) -> Iterator[tuple[dict[str, Any], list[int], tuple[int, int]]]:
        """(what a compiled program takes, which requests its first rows are, their size): requests of one size share batches.
        Prompts leave `room` tokens in a row."""
        check(0 <= seed < 2**32, f"seed={seed} must lie between 0 and {2**32 - 1}")
        if not requests:
            raise UserError("no prompt given: pass at least one")
        prompts = [self._prompt(request, room) for request in requests]
        length = -(-max(len(prompt.ids) for prompt in prompts) // LENGTH_BUCKET) * LENGTH_BUCKET
        shown, most = any(request.images for request in requests), settings.batch_size
        sizes: dict[tuple[int, int], list[int]] = {}
        for i, request in enumerate(requests):
            sizes.setdefault(self._size(request), []).append(i)
        for size, chosen in sizes.items():
            for start in range(0, len(chosen), most):
                rows = chosen[start : start + most]
                padded = rows + rows[-1:] * (most - len(rows))
                tokens_BL = np.zeros((most, length), np.int32)
                for row, i in zip(tokens_BL, padded, strict=True):
                    row[: len(prompts[i].ids)] = prompts[i].ids
                batch = {
                    "tokens_BL": tokens_BL,
                    "lengths_B": np.array([len(prompts[i].ids) for i in padded], np.int32),
                    "indices_B": np.array(padded, np.uint32) + np.uint32(first_index),
                    "seed": np.uint32(seed),
                }
                if shown:
                    views = [self._views(requests[i], prompts[i], size) for i in padded]
                    batch["shown"] = {name: np.stack([view[name] for view in views]) for name in views[0]}
                yield batch, rows, size

    def _size(self, request: Request) -> tuple[int, int]:
        model = self.config.model
        if request.size is not None:
            model.check_size(request.size, "size")
            return request.size
        return model.nearest_size(*request.images[0].shape[:2]) if request.images else model.sizes[0]

    def _prompt(self, request: Request, room: int) -> Prompt:
        model, limit, places = self.config.model, self.config.data.max_length, self.config.model.editing.references
        if len(request.images) > places:
            have = f"shows at most {places} in a row" if places else "was not trained to be shown any"
            raise UserError(f"{len(request.images)} images given, but the model {have}")
        tokenizer = model.tokenizer
        prompt = make_prompt(
            self.vocabulary,
            model.template,
            request.task,
            request.text,
            references=len(request.images),
            num_image_tokens=tokenizer.num_tokens,
            pool_scale=tokenizer.pool_scale,
        )
        if len(prompt.ids) + room > limit:
            kind = "image tokens" if room == tokenizer.num_tokens else "tokens"
            raise UserError(
                f"prompt {request.text[:60]!r}... is {len(prompt.ids)} tokens long; with {room} {kind} that is more than the "
                f"model's {limit}: shorten it"
            )
        return prompt

    def _views(self, request: Request, prompt: Prompt, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """What the batch has of a request's images, as in training (data/examples.py)."""
        places, side = self.config.model.editing.references, self.config.model.tokenizer.encoder.image_size
        blank = tuple(np.zeros((*shape, 3), np.uint8) for shape in (size, (side, side)))
        views = [images.views(image, size, side, self.config.data.crop) for image in request.images]
        views += [blank] * (places - len(views))
        spans_R = np.zeros(places, np.int32)
        spans_R[: len(prompt.references)] = prompt.references
        return {
            "reference_pixels": np.stack([view for view, _ in views]),
            "reference_tokenizer_pixels": np.stack([view for _, view in views]),
            "reference_span": spans_R,
            "reference_mask": (np.arange(places) < len(request.images)).astype(np.float32),
        }

    def settings(self, **overrides: Any) -> SamplingConfig:
        """The checkpoint's sampling settings with `overrides` (None leaves one as it is)."""
        known = {f.name for f in dataclasses.fields(SamplingConfig)}
        if unknown := set(overrides) - known:
            raise UserError(f"unknown sampling setting {', '.join(sorted(unknown))}: it takes {', '.join(sorted(known))}")
        settings = dataclasses.replace(self.config.sampling, **{k: v for k, v in overrides.items() if v is not None})
        shards = self.strategy.batch_shards
        # Padded up, since every device needs a row; rows past the last prompt are dropped.
        return dataclasses.replace(settings, batch_size=-(-settings.batch_size // shards) * shards)

    def autoencode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        """uint8 images [B, S, S, 3] through the autoencoder and back."""
        return np.asarray(self._autoencode(self._params, pixels_BHWC))

    def codes(self, tokenizer_pixels_BHWC: np.ndarray) -> np.ndarray:
        """uint8 images at the tokenizer's size -> codebook indices [B, N]."""
        return np.asarray(self._codes(self._params, tokenizer_pixels_BHWC))

    def _model(self, params: Any) -> Blip3o:
        return nnx.merge(self._graphdef, params)

    @functools.partial(jax.jit, static_argnums=0)
    def _autoencode(self, params: Any, pixels_BHWC: jax.Array) -> jax.Array:
        model = self._model(params)
        return to_uint8(model.pixels(model.latents(pixels_BHWC)))

    @functools.partial(jax.jit, static_argnums=0)
    def _codes(self, params: Any, pixels_BHWC: jax.Array) -> jax.Array:
        return self._model(params).codes(pixels_BHWC)


def make_sample(graphdef: Any, strategy: Strategy, image_ids: tuple[int, int]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The compiled program that draws a batch: (params, tokens_BL, lengths_B, indices_B, seed, settings, shown, size), settings
    and size static, -> (uint8 images [B, H, W, 3], codes [B, N]). `image_ids` is (first, last + 1); `shown` are the
    reference_* arrays of a batch whose rows have places for images, or None; `size` is (height, width), None the model's first.
    """

    def sample(
        params: Any,
        tokens_BL: jax.Array,
        lengths_B: jax.Array,
        indices_B: jax.Array,
        seed: jax.Array,
        settings: SamplingConfig,
        shown: dict[str, jax.Array] | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        model: Blip3o = nnx.merge(graphdef, params)
        with nn.sharding_resolver(strategy.resolver):
            tokens_BL = nn.constrain(tokens_BL, "batch", None)
            x_BHWC, ids_BN = draw_images(
                model, tokens_BL, lengths_B, row_keys(seed, indices_B), settings, image_ids, shown, size
            )
            return to_uint8(x_BHWC), codes_from_image_ids(ids_BN, image_ids[0])

    # Unused parameters stay arguments, since they lie in the device's memory all the same.
    return jax.jit(sample, static_argnames=("settings", "size"), keep_unused=True)


def draw_images(
    model: Blip3o,
    tokens_BL: jax.Array,
    lengths_B: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    settings: SamplingConfig,
    image_ids: tuple[int, int],
    shown: dict[str, jax.Array] | None,
    size: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Prompts -> images [B, H, W, 3] in [0, 1], float32, and the ids of their tokens [B, N]. `keys` as of `row_keys`, other
    arguments as of `make_sample`'s program."""
    token_keys_B, noise_keys_B = keys
    tokens_BL, embedded_BLD, seen = _with_images(model, tokens_BL, shown, image_ids[0])
    drawn = draw_tokens(model, tokens_BL, lengths_B, token_keys_B, settings, image_ids, embedded_PLD=embedded_BLD)
    noise_BHWC, guidance = draw_noise(model.cfg, noise_keys_B, size), model.guidance(drawn.hidden_BTD, settings, seen)
    with nn.part("dit"):
        z_BHWC = sampler.sample(model.dit, guidance, noise_BHWC, steps=settings.steps, flow=model.cfg.flow)
    return model.pixels(z_BHWC), drawn.ids_BN


def make_write(graphdef: Any, strategy: Strategy, vocabulary: Vocabulary) -> Callable[..., Written]:
    """The compiled program that answers in words; arguments as of `make_sample`'s, and `most` tokens, static."""
    stop, text_ids, image_first = vocabulary.end_of_turn, (0, vocabulary.image_start), vocabulary.image_first

    def write(
        params: Any,
        tokens_BL: jax.Array,
        lengths_B: jax.Array,
        indices_B: jax.Array,
        seed: jax.Array,
        settings: SamplingConfig,
        shown: dict[str, jax.Array],
        most: int,
    ) -> Written:
        model: Blip3o = nnx.merge(graphdef, params)
        with nn.sharding_resolver(strategy.resolver):
            tokens_BL = nn.constrain(tokens_BL, "batch", None)
            keys_B, _ = row_keys(seed, indices_B)
            tokens_BL, embedded_BLD, _ = _with_images(model, tokens_BL, shown, image_first)
            with nn.part("ar"):
                return generate_text(
                    model.ar,
                    tokens_BL,
                    lengths_B,
                    keys_B,
                    most=most,
                    text_ids=text_ids,
                    stop=stop,
                    temperature=settings.temperature,
                    top_k=min(settings.top_k, text_ids[1]),
                    top_p=settings.top_p,
                    embedded_BLD=embedded_BLD,
                )

    return jax.jit(write, static_argnames=("settings", "most"), keep_unused=True)


def _with_images(
    model: Blip3o, tokens_BL: jax.Array, shown: dict[str, jax.Array] | None, image_first: int
) -> tuple[jax.Array, jax.Array | None, References | None]:
    """Prompts with their images in them: tokens, embeddings where these are not the tokens', and the images as encoded."""
    if shown is None:
        return tokens_BL, None, None
    seen, span_BR = references(model, shown), shown["reference_span"]
    tokens_BL = insert_references(tokens_BL, span_BR, image_ids_from_codes(seen.codes_BRN, image_first), seen.mask_BR)
    if seen.features_BRND is None:
        return tokens_BL, None, seen
    return tokens_BL, model.embed(tokens_BL, (seen.features_BRND, span_BR, seen.mask_BR)), seen


def _several(shown: Any) -> tuple[np.ndarray, ...]:
    """One image, or a sequence of them."""
    return (shown,) if isinstance(shown, np.ndarray) and shown.ndim == 3 else tuple(shown)


def row_keys(seed: jax.Array, indices_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys of each row's image tokens and of its noise, folded from (seed, index)."""
    keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(indices_B)
    return tuple(jax.vmap(jax.random.split, out_axes=1)(keys_B))


def draw_tokens(
    model: Blip3o,
    tokens_PL: jax.Array,
    lengths_P: jax.Array,
    keys_B: jax.Array,
    settings: SamplingConfig,
    image_ids: tuple[int, int],
    **more: Any,
) -> Drawn:
    """`generate_image_tokens` as `settings` say; `more` are further arguments of it."""
    with nn.part("ar"):
        return generate_image_tokens(
            model.ar,
            tokens_PL,
            lengths_P,
            keys_B,
            num_tokens=model.cfg.tokenizer.num_tokens,
            image_ids=image_ids,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            guidance=settings.token_guidance,
            **more,
        )


def draw_noise(cfg: ModelConfig, keys_B: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """What the denoising of images of `size` starts from, float32 [B, H, W, C]."""
    shape = (*(side // cfg.vae.spatial_compression for side in size or cfg.sizes[0]), cfg.vae.latent_channels)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys_B)


def to_uint8(x: jax.Array) -> jax.Array:
    """[0, 1] -> uint8, rounded."""
    return jnp.round(x * 255).astype(jnp.uint8)


def load(path: str | pathlib.Path, mesh: MeshConfig | None = None) -> Pipeline:
    """The pipeline of a joint run's checkpoint: its workdir, checkpoints directory or one step. Needs nothing else.

    `mesh` places it (all devices, batch-parallel, by default). Raises UserError when `path` is not such a checkpoint.
    """
    root, _ = checkpoints.find(path)
    config = checkpoints.read_config(root)
    if config.stage != "joint":
        raise UserError(f"{root} was written by stage {config.stage!r}; sampling needs a checkpoint of stage 'joint'")
    mesh = mesh or MeshConfig(data=-1, fsdp=1, strategy="dp")
    strategy = Strategy.of(mesh)
    parts = stage_parts(config)
    params = checkpoints.restore_parts(path, strategy, parts)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Blip3o(config.model, parts, seed=0)))
    text = dataclasses.replace(config.model.text, path=str(root / "text"))
    vocabulary = Vocabulary(load_tokenizer(text), config.model.tokenizer.codebook_size)
    return Pipeline(config, graphdef, params, vocabulary, strategy)


def draw_to_directory(
    checkpoint: str | pathlib.Path,
    requests: Sequence[tuple[Any, ...]],
    out: str | pathlib.Path,
    *,
    seed: int,
    overrides: dict[str, Any],
) -> list[pathlib.Path]:
    """Writes 00000.png, ... , a labelled grid.png and prompts.jsonl under `out`; returns the images' paths. `requests` are the
    fields of `Request`."""
    generated = load(checkpoint).draw([Request(*fields) for fields in requests], seed=seed, progress=True, **overrides)
    return write_images(generated.images, generated.prompts, pathlib.Path(out))
