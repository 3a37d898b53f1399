"""Sample from a trained model, loaded from a checkpoint by `model = blip3o_jax.load(DIR)`.

    model.generate(["a red circle"])                    text -> images
    model.edit([photo], ["make the sky green"])         image(s) and an instruction -> images
    model.reconstruct([photo])                          image -> its tokens -> image
    model.ask([photo], ["what colour is the sky?"])     image(s) and a question -> text
    model.generate_requests([Request("t2i", ...), ...]) requests of several tasks

Legend: B batch, L prompt length, N image tokens, H W C image or latent, R reference slots.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config, MeshConfig, SamplingConfig, UserError, check
from blip3o_jax.data import images
from blip3o_jax.data.sequence import padded_length, padded_prompts
from blip3o_jax.data.template import PromptTokens, make_prompt
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.progress import Progress
from blip3o_jax.samples import check_images_out, write_images
from blip3o_jax.sampling_programs import (
    make_image_sampler,
    make_text_sampler,
    to_uint8,
)
from blip3o_jax.text.tokenizers import load_tokenizer
from blip3o_jax.text.vocabulary import Vocabulary
from blip3o_jax.train import checkpoint as checkpoints
from blip3o_jax.train.stages import stage_parts


@dataclasses.dataclass(frozen=True)
class Request:
    """Hold a task and its inputs.

    `text` is the caption, instruction or question; `images` are the reference images, uint8
    [H, W, 3] of any size. `size` is the output's (height, width); None selects the model's size
    with the aspect ratio nearest to the first image's, or its first size without images.
    """

    task: str  # of data/template.py
    text: str = ""
    images: tuple[np.ndarray, ...] = ()
    size: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Generated:
    """Hold sampled images and their codebook indices, in the order of the prompts.

    `images` is uint8 [B, H, W, 3], or a list of [H, W, 3] when the sizes differ; `codes` is [B, N].
    """

    prompts: list[str]
    images: np.ndarray | list[np.ndarray]
    codes: np.ndarray


class Pipeline:
    """Sample from a trained model on a mesh. `params` is {part: nested dict of arrays}."""

    def __init__(
        self, config: Config, graphdef: Any, params: Any, vocabulary: Vocabulary, strategy: Strategy
    ):
        self.config = config
        self.vocabulary = vocabulary
        self.strategy = strategy
        self._graphdef = graphdef
        self._params = params
        image_ids = vocabulary.image_token_offset, vocabulary.image_token_end
        self._sample_images = make_image_sampler(graphdef, strategy, image_ids)
        self._sample_text = make_text_sampler(graphdef, strategy, vocabulary)
        self._autoencode = strategy.jit(self._autoencode_batch)
        self._codes = strategy.jit(self._code_batch)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        progress: bool = False,
        first_index: int = 0,
        **overrides: Any,
    ) -> Generated:
        """Sample one image per prompt; see `generate_requests`."""
        requests = [Request("t2i", prompt) for prompt in prompts]
        return self.generate_requests(
            requests, seed=seed, progress=progress, first_index=first_index, **overrides
        )

    def edit(self, images: Sequence[Any], instructions: Sequence[str], **more: Any) -> Generated:
        """Sample one image per instruction.

        `images` holds for each instruction the image to edit, or a sequence of images; `more` are
        keyword arguments of `generate_requests`.
        """
        pairs = zip(images, instructions, strict=True)
        return self.generate_requests(
            [Request("edit", text, _image_tuple(image)) for image, text in pairs], **more
        )

    def reconstruct(self, images: Sequence[np.ndarray], **more: Any) -> Generated:
        """Reconstruct each image from its tokens.

        `more` are keyword arguments of `generate_requests`.
        """
        return self.generate_requests(
            [Request("reconstruct", "", (image,)) for image in images], **more
        )

    def generate_requests(
        self,
        requests: Sequence[Request],
        *,
        seed: int = 0,
        progress: bool = False,
        first_index: int = 0,
        **overrides: Any,
    ) -> Generated:
        """Sample one image per request, for tasks whose output is an image.

        `overrides` are fields of SamplingConfig (steps, guidance, temperature, top_k, ...). Image i
        depends only on (seed, first_index + i, requests[i]) and the settings, not on the other
        requests. Raises UserError for an empty sequence, an unknown setting, or a request that does
        not fit the model's rows.
        """
        check(
            all(request.task != "understand" for request in requests),
            "task understand has text as its output: use ask",
        )
        settings = self.settings(**overrides)
        outputs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        batches = self._batches(
            requests, seed, first_index, settings, self.config.model.tokenizer.num_tokens
        )
        with Progress("sample", len(requests), after="images", shown=progress) as shown:
            for batch, rows, size in batches:
                with shown.once("compiling", size):
                    pixels_BHWC, codes_BN = self._sample_images(
                        self._params, **batch, settings=settings, size=size
                    )
                # The program's rows past the requests are padding, which `strict=False` drops.
                found = zip(np.asarray(pixels_BHWC), np.asarray(codes_BN), strict=True)
                outputs |= dict(zip(rows, found, strict=False))
                shown.advance(len(rows))
        images = [outputs[i][0] for i in range(len(requests))]
        same_shape = len({image.shape for image in images}) == 1
        return Generated(
            [request.text for request in requests],
            np.stack(images) if same_shape else images,
            np.stack([outputs[i][1] for i in range(len(requests))]),
        )

    def ask(
        self,
        images: Sequence[Any],
        questions: Sequence[str],
        *,
        seed: int = 0,
        progress: bool = False,
        max_new_tokens: int = 64,
        first_index: int = 0,
        temperature: float = 0.0,
        **overrides: Any,
    ) -> list[str]:
        """Return the answer to each question.

        An answer has at most `max_new_tokens` tokens and ends with its row; it is greedy at
        temperature 0 and sampled otherwise. `images` is as in `edit`. An answer depends on the same
        inputs as an image of `generate_requests`.
        """
        settings = self.settings(temperature=temperature, **overrides)
        pairs = zip(images, questions, strict=True)
        requests = [Request("understand", text, _image_tuple(image)) for image, text in pairs]
        answers: dict[int, str] = {}
        with Progress("answer", len(requests), after="questions", shown=progress) as shown:
            for batch, rows, size in self._batches(requests, seed, first_index, settings, 1):
                with shown.once("compiling", size):
                    outputs = self._sample_text(
                        self._params, **batch, settings=settings, max_new_tokens=max_new_tokens
                    )
                ids_BN, count_B = map(np.asarray, outputs)
                count_B = np.minimum(count_B, self.config.data.max_length - batch["lengths_B"])
                answers |= {
                    i: self.vocabulary.decode(ids[:n]).strip()
                    for i, ids, n in zip(rows, ids_BN, count_B, strict=False)
                }
                shown.advance(len(rows))
        return [answers[i] for i in range(len(requests))]

    def _batches(
        self,
        requests: Sequence[Request],
        seed: int,
        first_index: int,
        settings: SamplingConfig,
        room: int,
    ) -> Iterator[tuple[dict[str, Any], list[int], tuple[int, int]]]:
        """Yield (arguments of a sampling program, indices of its requests, their size).

        Requests of one size share batches; the last request fills the rows of a partial batch.
        Prompts leave `room` tokens in a row.
        """
        check(0 <= seed < 2**32, f"seed={seed} must lie between 0 and {2**32 - 1}")
        if not requests:
            raise UserError("no prompt given: pass at least one")
        prompts = [self._prompt(request, room) for request in requests]
        # One length for all batches of the call, so that sizes alone compile further programs.
        length = padded_length(max(len(prompt.ids) for prompt in prompts))
        has_references = any(request.images for request in requests)
        sizes: dict[tuple[int, int], list[int]] = {}
        for i, request in enumerate(requests):
            sizes.setdefault(self._size(request), []).append(i)
        for size, chosen in sizes.items():
            batch_size = _batch_size(len(chosen), settings.batch_size, self.strategy.batch_shards)
            for start in range(0, len(chosen), batch_size):
                rows = chosen[start : start + batch_size]
                padded = rows + rows[-1:] * (batch_size - len(rows))
                tokens_BL, lengths_B = padded_prompts([prompts[i].ids for i in padded], length)
                batch: dict[str, Any] = {
                    "tokens_BL": tokens_BL,
                    "lengths_B": lengths_B,
                    # Indices into the caller's sequence, not the batch: an image's random numbers
                    # do not depend on which requests share its batch.
                    "indices_B": np.array(padded, np.uint32) + np.uint32(first_index),
                    "seed": np.uint32(seed),
                }
                # All batches have reference arrays if any request has, with empty slots masked: one
                # program for both.
                if has_references:
                    views = [self._views(requests[i], prompts[i], size) for i in padded]
                    batch["references"] = {
                        name: np.stack([view[name] for view in views]) for name in views[0]
                    }
                yield batch, rows, size

    def _size(self, request: Request) -> tuple[int, int]:
        model = self.config.model
        if request.size is not None:
            model.check_size(request.size, "size")
            return request.size
        return (
            model.nearest_size(*request.images[0].shape[:2]) if request.images else model.sizes[0]
        )

    def _prompt(self, request: Request, room: int) -> PromptTokens:
        model = self.config.model
        limit = self.config.data.max_length
        slots = model.editing.reference_slots
        if len(request.images) > slots:
            have = (
                f"takes at most {slots} in a row: leave some out"
                if slots
                else "was not trained with any: take a checkpoint of a run with"
                " model.editing.reference_slots of 1 or more (docs/editing.md)"
            )
            raise UserError(f"images given: {len(request.images)}, but the model {have}")
        for image in request.images:
            _check_image(image)
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
            kind = "token of an answer" if request.task == "understand" else "image tokens"
            raise UserError(
                f"prompt {request.text[:60]!r}... is {len(prompt.ids)} tokens long; with {room} "
                f"{kind} that is more than the model's {limit}: shorten it"
            )
        return prompt

    def _views(
        self, request: Request, prompt: PromptTokens, size: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """Return the reference_* arrays of a request, as training has them (data/examples.py)."""
        slots = self.config.model.editing.reference_slots
        side = self.config.model.tokenizer.image_size
        blank = (np.zeros((*size, 3), np.uint8), np.zeros((side, side, 3), np.uint8))
        views = [images.views(image, size, side, self.config.data.crop) for image in request.images]
        views += [blank] * (slots - len(views))
        spans_R = np.zeros(slots, np.int32)
        spans_R[: len(prompt.references)] = prompt.references
        return {
            "reference_pixels": np.stack([view for view, _ in views]),
            "reference_tokenizer_pixels": np.stack([view for _, view in views]),
            "reference_span": spans_R,
            "reference_mask": (np.arange(slots) < len(request.images)).astype(np.float32),
        }

    def settings(self, **overrides: Any) -> SamplingConfig:
        """Return the checkpoint's sampling settings with `overrides`; None keeps a setting.

        Raises UserError for an unknown setting.
        """
        known = {f.name for f in dataclasses.fields(SamplingConfig)}
        if unknown := set(overrides) - known:
            raise UserError(
                f"unknown sampling setting {', '.join(sorted(unknown))}: "
                f"use {', '.join(sorted(known))}"
            )
        settings = dataclasses.replace(
            self.config.sampling, **{k: v for k, v in overrides.items() if v is not None}
        )
        shards = self.strategy.batch_shards
        # Every device needs a row, so the batch size is rounded up; rows past the last prompt are
        # dropped.
        return dataclasses.replace(settings, batch_size=-(-settings.batch_size // shards) * shards)

    def autoencode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        """Encode and decode uint8 images [B, S, S, 3] with the autoencoder."""
        return self._by_image(self._autoencode, pixels_BHWC)

    def codes(self, tokenizer_pixels_BHWC: np.ndarray) -> np.ndarray:
        """Encode uint8 images [B, S, S, 3] at the tokenizer's size to codebook indices [B, N]."""
        return self._by_image(self._codes, tokenizer_pixels_BHWC)

    def _model(self, params: Any) -> Blip3o:
        return nnx.merge(self._graphdef, params)

    def _autoencode_batch(self, params: Any, pixels_BHWC: jax.Array) -> jax.Array:
        model = self._model(params)
        return to_uint8(model.pixels(model.latents(pixels_BHWC)))

    def _code_batch(self, params: Any, pixels_BHWC: jax.Array) -> jax.Array:
        return self._model(params).codes(pixels_BHWC)

    def _by_image(
        self, program: Callable[[Any, np.ndarray], jax.Array], pixels_BHWC: np.ndarray
    ) -> np.ndarray:
        """Return the outputs of `program` for each image [B, H, W, 3].

        The last image is repeated until the batch size is divisible by the mesh's batch shards; the
        outputs of the copies are dropped.
        """
        missing = -len(pixels_BHWC) % self.strategy.batch_shards
        padded_BHWC = np.concatenate([pixels_BHWC, np.repeat(pixels_BHWC[-1:], missing, axis=0)])
        return np.asarray(program(self._params, padded_BHWC))[: len(pixels_BHWC)]


def _batch_size(requests: int, largest: int, shards: int) -> int:
    """Return the number of rows of a batch for `requests`, padding included.

    It is `largest`, or for fewer requests a power of two per shard, so that few programs are
    compiled.
    """
    return min(largest, shards * 2 ** (-(-requests // shards) - 1).bit_length())


def _image_tuple(images: Any) -> tuple[Any, ...]:
    """Return one image, or a sequence of them, as a tuple."""
    return (
        tuple(images)
        if isinstance(images, list | tuple) or getattr(images, "ndim", 3) == 4
        else (images,)
    )


def _check_image(image: Any) -> None:
    is_array = isinstance(image, np.ndarray)
    found = f"{image.dtype} {list(image.shape)}" if is_array else type(image).__name__
    fits = (
        is_array
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3
        and image.size > 0
    )
    check(
        fits,
        f"an image must be a uint8 array [H, W, 3], not {found}: "
        "blip3o_jax.data.images.load reads one from a file",
    )


def load(path: str | pathlib.Path, mesh: MeshConfig | None = None) -> Pipeline:
    """Load the pipeline from the checkpoint of a run of stage "joint".

    `path` is the run's workdir, its checkpoints directory or one step; no other file is needed.
    `mesh` places the model (default: all devices, data-parallel). Raises UserError when `path` is
    not such a checkpoint.
    """
    root, _ = checkpoints.find(path)
    config = checkpoints.read_config(root)
    if config.stage != "joint":
        raise UserError(
            f"{root} was written by stage {config.stage!r}; sampling needs a checkpoint of stage "
            "'joint'"
        )
    mesh = mesh or MeshConfig(data=-1, fsdp=1, strategy="dp")
    strategy = Strategy.of(mesh)
    parts = stage_parts(config)
    params = checkpoints.restore_parts(path, strategy, parts)
    # `eval_shape` makes the structure without allocating a second copy of the weights.
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Blip3o(config.model, parts, seed=0)))
    text = checkpoints.stored_text(root, config.model.text)
    vocabulary = Vocabulary(load_tokenizer(text), config.model.tokenizer.codebook_size)
    return Pipeline(config, graphdef, params, vocabulary, strategy)


def generate_to_directory(
    checkpoint: str | pathlib.Path,
    requests: Sequence[tuple[Any, ...]],
    out: str | pathlib.Path,
    *,
    seed: int,
    overrides: dict[str, Any],
) -> list[pathlib.Path]:
    """Sample and write 00000.png, ..., a labelled grid.png and prompts.jsonl under `out`.

    Returns the images' paths. `requests` are the fields of `Request`.
    """
    check_images_out(pathlib.Path(out))
    sampled = [Request(*fields) for fields in requests]
    generated = load(checkpoint).generate_requests(sampled, seed=seed, progress=True, **overrides)
    return write_images(
        list(generated.images),
        generated.prompts,
        pathlib.Path(out),
        inputs=[request.images for request in sampled],
    )
