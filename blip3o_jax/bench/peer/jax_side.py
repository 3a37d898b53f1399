"""Run this package's side of the comparison: the train step and the pipeline as `blip3o train` and
`blip3o sample` run them.

On a CPU all is float32; on a GPU everything computes in bfloat16, with the train step's parameters
in float32.
"""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.bench.peer.worker import Arrays, Prepared, Task
from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import Config, DataConfig, LossConfig, MeshConfig, OptimizerConfig, UserError
from blip3o_jax.config.errors import install_command
from blip3o_jax.dit import sampler
from blip3o_jax.parallel.mesh import split_cpu
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.pipeline import Pipeline
from blip3o_jax.sampling_programs import sample_image_tokens
from blip3o_jax.text.tokenizers import load_tokenizer
from blip3o_jax.text.vocabulary import Vocabulary
from blip3o_jax.train.checkpoint import find, read_config, restore_parts, stored_text
from blip3o_jax.train.flops import count_flops, model_flops
from blip3o_jax.train.joint_loss import sample_training_noise
from blip3o_jax.train.stages import STAGES, make_loss
from blip3o_jax.train.state import WEIGHTS, create_state, plan_state
from blip3o_jax.train.train_step import example_keys, make_step

# the first moves nothing, at a learning rate of 0; the third sees what the second moved
CHECKED_STEPS = 3


class Side:
    """Build the items in JAX."""

    def __init__(self, task: Task):
        if task.device == "cpu":
            split_cpu(task.jax_devices)
        try:
            devices = jax.devices()
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # the latter where jaxlib has no plugin for CUDA
            raise UserError(
                "bench peer --device=gpu: JAX finds no GPU; use --device=cpu, or install "
                f"jax[cuda13] ({install_command('cuda')})"
            ) from error
        devices = devices[: task.jax_devices]
        mesh = MeshConfig(data=len(devices), fsdp=1, strategy="dp")
        self.strategy = Strategy.of(mesh, devices)
        self.strategy.check_batch(task.batch_size)
        self.task, self.half = task, task.device == "gpu"
        self.root, _ = find(task.directory)
        self.config = read_config(self.root)

    def describe(self) -> dict[str, Any]:
        devices = self.strategy.mesh.devices.flat
        versions = {"jax": jax.__version__}
        return {
            "device_kind": devices[0].device_kind,
            "versions": versions,
            "devices": len(list(devices)),
        }

    def build(self, item: str, inputs: Arrays) -> Prepared:
        return getattr(self, f"_{item}")(inputs)

    def release(self) -> None:
        jax.clear_caches()
        gc.collect()

    def _put(self, *arrays: np.ndarray | jax.Array) -> Any:
        return jax.device_put(arrays, self.strategy.batch_sharding())

    def _prepared(
        self, call: Callable[[], Any], outputs: Callable[[Any], Arrays] | None = None, **more: Any
    ) -> Prepared:
        memory = None
        if self.half:
            memory = lambda: self.strategy.mesh.devices.flat[0].memory_stats()["peak_bytes_in_use"]
        return Prepared(lambda: jax.block_until_ready(call()), outputs, memory=memory, **more)

    def _train_step(self, inputs: Arrays) -> Prepared:
        return self._train(inputs, ("codes", "latents"))

    def _train_step_online(self, inputs: Arrays) -> Prepared:
        return self._train(inputs, ("tokenizer_pixels", "pixels"))

    def _train(self, inputs: Arrays, views: tuple[str, ...]) -> Prepared:
        rows, length = inputs["tokens"].shape
        rate = float(inputs["learning_rate"])
        model = in_dtype(self.config.model, "bfloat16" if self.half else "float32", "float32")
        config = Config(
            steps=10**6,
            model=model,
            data=DataConfig(batch_size=rows, max_length=length),
            optimizer=OptimizerConfig(
                learning_rate=rate, end_learning_rate=rate, warmup_fraction=0.0
            ),
            loss=LossConfig(),
        )
        plan = plan_state(config, self.strategy)
        read = restore_parts(self.task.directory, self.strategy, STAGES["joint"].parts)
        given = {
            part: {
                group: _like(plan.abstract[group][part], read[part])
                for group in WEIGHTS
                if part in plan.abstract[group]
            }
            for part in STAGES["joint"].parts
        }
        del read
        state = create_state(config, plan, given)
        del given
        names = ("tokens", "loss_mask", "segment_ids", "positions", "image_span", *views)
        batch = {name: inputs[name] for name in names} | {"bad_records": np.zeros(rows, np.int32)}
        batch = jax.device_put(batch, self.strategy.batch_sharding())
        step = make_step(
            config, plan, self.strategy, make_loss(config, self.task.image_token_offset)
        )

        def call() -> Any:
            nonlocal state
            state, metrics = step(state, batch)
            jax.block_until_ready(state)
            return {name: float(metrics[name]) for name in ("ce", "flow")}

        return self._prepared(
            call,
            lambda metrics: {"losses": np.array([metrics["ce"], metrics["flow"]], np.float32)},
            checks=CHECKED_STEPS,
            shared=self._draws(config, rows),
            cost={"flops": model_flops(config, self.strategy, batch)},
        )

    def _draws(self, config: Config, rows: int) -> Arrays:
        """Return the noise of the first steps, which the other side uses too."""
        model, size = config.model, config.model.latent_size
        shape = (size, size, model.vae.latent_channels)
        draws = jax.jit(
            lambda: [
                sample_training_noise(
                    example_keys(config.seed, step, rows), shape, model, config.loss
                )
                for step in range(CHECKED_STEPS)
            ]
        )()
        training_noise = jax.tree.map(lambda *steps: np.stack(steps), *jax.device_get(draws))
        return {
            "noise": training_noise.noise[:, :, 0],
            "sigma": training_noise.sigma[:, :, 0],
            "keep": training_noise.keep_B,
        }

    def _pipeline(self, *parts: str) -> Pipeline:
        dtype = "bfloat16" if self.half else "float32"
        config = dataclasses.replace(
            self.config,
            model=in_dtype(self.config.model, dtype, dtype),
            sampling=self.task.settings,
        )
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: Blip3o(config.model, parts, seed=0)))
        params = jax.tree.map(
            lambda x: x.astype(dtype), restore_parts(self.task.directory, self.strategy, parts)
        )
        text = stored_text(self.root, config.model.text)
        vocabulary = Vocabulary(load_tokenizer(text), config.model.tokenizer.codebook_size)
        return Pipeline(config, graphdef, params, vocabulary, self.strategy)

    def _jitted(
        self, parts: tuple[str, ...], run: Callable[..., Any], *arrays: np.ndarray | jax.Array
    ) -> tuple[Any, int, Pipeline]:
        """Return (call, FLOPs, pipeline) of a function of (model, *arrays)."""
        pipeline = self._pipeline(*parts)

        def traced(params: Any, *arrays: jax.Array) -> Any:
            return run(nnx.merge(pipeline._graphdef, params), *arrays)

        compiled = self.strategy.jit(traced)
        placed = self._put(*arrays)
        return (
            lambda: compiled(pipeline._params, *placed),
            count_flops(compiled, pipeline._params, *placed),
            pipeline,
        )

    def _ar_decode(self, inputs: Arrays) -> Prepared:
        settings, first = self.task.settings, self.task.image_token_offset
        image_ids = first, first + self.config.model.tokenizer.codebook_size
        keys_B = jax.random.split(jax.random.key(0), len(inputs["prompts"]))

        def run(
            model: Blip3o, tokens_BL: jax.Array, lengths_B: jax.Array, keys_B: jax.Array
        ) -> Any:
            return sample_image_tokens(model, tokens_BL, lengths_B, keys_B, settings, image_ids)

        call, flops, pipeline = self._jitted(
            ("ar",), run, inputs["prompts"], inputs["lengths"], keys_B
        )
        return self._prepared(
            call, cost={"flops": flops, "bytes": self._decode_bytes(pipeline, inputs)}
        )

    def _decode_bytes(self, pipeline: Pipeline, inputs: Arrays) -> int:
        """Return the bytes read from memory for all tokens of a batch: for each token the weights,
        the image ids' rows of the head and the keys and values so far."""
        ar, tokens = pipeline.config.model.ar, self.config.model.tokenizer.num_tokens
        size = np.dtype(ar.dtype).itemsize
        weights = sum(x.size for x in jax.tree.leaves(pipeline._params["ar"]["layers"]))
        head = self.config.model.tokenizer.codebook_size * ar.hidden_size
        slots = float(np.mean(inputs["lengths"])) + tokens / 2
        cache = (
            2
            * ar.num_hidden_layers
            * len(inputs["lengths"])
            * slots
            * ar.num_key_value_heads
            * ar.head_dim
        )
        return int(tokens * size * (weights + head + cache))

    def _dit_step(self, inputs: Arrays) -> Prepared:
        settings, flow = self.task.settings, self.config.model.flow

        def run(model: Blip3o, hidden_BTD: jax.Array, noise_BHWC: jax.Array) -> jax.Array:
            guidance = model.guidance(hidden_BTD, settings)
            with nn.part("dit"):
                return sampler.sample(
                    model.dit, guidance, noise_BHWC, steps=settings.steps, flow=flow
                )

        return self._compared(
            "latents", ("connector", "dit"), run, inputs["hidden"], inputs["start"]
        )

    def _vae_encode(self, inputs: Arrays) -> Prepared:
        return self._compared(
            "latents", ("vae",), lambda model, x: model.latents(x), inputs["pixels"]
        )

    def _vae_decode(self, inputs: Arrays) -> Prepared:
        return self._compared(
            "pixels", ("vae",), lambda model, z: model.pixels(z), inputs["latents"]
        )

    def _tokenizer(self, inputs: Arrays) -> Prepared:
        return self._compared(
            "ids", ("tokenizer",), lambda model, x: model.codes(x), inputs["tokenizer_pixels"]
        )

    def _compared(
        self, output: str, parts: tuple[str, ...], run: Callable[..., Any], *arrays: np.ndarray
    ) -> Prepared:
        call, flops, _ = self._jitted(parts, run, *arrays)
        return self._prepared(call, lambda x: {output: np.asarray(x)}, cost={"flops": flops})

    def _text_to_image(self, inputs: Arrays) -> Prepared:
        pipeline, seeds = self._pipeline("ar", "connector", "dit", "vae"), iter(range(2**32))
        captions = [str(caption) for caption in inputs["captions"]]
        return self._prepared(lambda: pipeline.generate(captions, seed=next(seeds)).images)


def in_dtype(cfg: Any, dtype: str, param_dtype: str) -> Any:
    """Return a configuration in which every part computes in `dtype` on parameters of
    `param_dtype`."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in ("dtype", "param_dtype"):
            changes[field.name] = dtype if field.name == "dtype" else param_dtype
        elif dataclasses.is_dataclass(value):
            changes[field.name] = in_dtype(value, dtype, param_dtype)
    return dataclasses.replace(cfg, **changes)


def _like(abstract: Any, tree: Any) -> Any:
    """Return the arrays of `tree` that are in `abstract`, with its dtypes and shardings."""
    if isinstance(abstract, dict):
        return {name: _like(child, tree[name]) for name, child in abstract.items()}
    return jax.device_put(tree.astype(abstract.dtype), abstract.sharding)
