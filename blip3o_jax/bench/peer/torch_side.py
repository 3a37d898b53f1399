"""Run PyTorch's side of the comparison: the stock classes of convert/torch_model.py, eager or
compiled.

No JAX backend is started in this process. Every item loads the parts it needs anew, since training
changes them. On a CPU all is float32; on a GPU everything runs in bfloat16, except that trained
parameters are float32 under autocast, as here in JAX.
"""

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from blip3o_jax.bench.peer.worker import Arrays, Prepared, Task
from blip3o_jax.config import OptimizerConfig, UserError
from blip3o_jax.convert.mapping import groups
from blip3o_jax.convert.source import open_source
from blip3o_jax.convert.tables import PUBLISHED_PARTS
from blip3o_jax.convert.torch_files import load_torch
from blip3o_jax.convert.torch_model import Blip3o


class Side:
    """Build the items in PyTorch."""

    def __init__(self, task: Task):
        if task.device == "gpu" and not torch.cuda.is_available():
            raise UserError(
                "bench peer --device=gpu: PyTorch finds no GPU; use --device=cpu, or install "
                "PyTorch for CUDA"
            )
        torch.set_num_threads(task.threads)
        self.task, self.device = task, "cuda" if task.device == "gpu" else "cpu"
        self.half = task.device == "gpu"
        self.compiled = task.side == "torch_compiled"

    def describe(self) -> dict[str, Any]:
        import diffusers
        import transformers

        device = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        versions = {
            module.__name__: module.__version__ for module in (torch, transformers, diffusers)
        }
        return {"device_kind": device, "versions": versions, "threads": torch.get_num_threads()}

    def build(self, item: str, inputs: Arrays) -> Prepared:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return getattr(self, f"_{item}")(inputs)

    def release(self) -> None:
        gc.collect()
        if self.compiled:
            torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _model(self, *parts: str) -> Blip3o:
        model = load_torch(open_source(self.task.directory), parts)
        return model.to(self.device, torch.bfloat16 if self.half else torch.float32).requires_grad_(
            False
        )

    def _put(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x.copy()).to(self.device)

    def _image(self, x_BHWC: np.ndarray) -> torch.Tensor:
        return self._put(np.ascontiguousarray(np.moveaxis(x_BHWC, -1, 1)))

    def _prepared(
        self, call: Callable[[], Any], outputs: Callable[[Any], Arrays] | None = None, **more: Any
    ) -> Prepared:
        def timed() -> Any:
            value = call()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return value

        memory = torch.cuda.max_memory_allocated if self.device == "cuda" else None
        return Prepared(timed, outputs, memory=memory, **more)

    def _compile(self, model: Blip3o, *parts: str) -> None:
        """Compile the modules of each part that are called as a whole."""
        for part in parts if self.compiled else ():
            module = getattr(model, part)
            if part == "tokenizer":
                module.encode = torch.compile(module.encode)
            elif part == "vae":
                module.encoder.compile()
                module.decoder.compile()
            elif part == "ar":
                module.model.compile()
            else:
                module.compile()

    def _train_step(self, inputs: Arrays) -> Prepared:
        """Build the train step on given codes and latents, as from the encoders' cache."""
        return self._train(inputs, online=False)

    def _train_step_online(self, inputs: Arrays) -> Prepared:
        """Build the train step with the frozen encoders in it."""
        return self._train(inputs, online=True)

    def _train(self, inputs: Arrays, *, online: bool) -> Prepared:
        model, optimizer = self._model(*PUBLISHED_PARTS), OptimizerConfig()
        trained = self._trained(model)
        self._compile(model, *PUBLISHED_PARTS)
        rate = float(inputs["learning_rate"])
        adamw = torch.optim.AdamW(
            trained,
            lr=0.0,  # the first step of the warm-up
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.eps,
            weight_decay=0.0,
            fused=True,
        )
        tokens_BL, mask_BL, span_B = (
            self._put(inputs[name]) for name in ("tokens", "loss_mask", "image_span")
        )
        if online:
            views = self._image(inputs["tokenizer_pixels"]), self._image(inputs["pixels"])
        else:
            views = self._put(inputs["codes"]), self._image(inputs["latents"])
        given = [self._draws(inputs, i) for i in range(len(inputs["sigma"]))]
        steps = model.cfg.flow.num_train_timesteps
        autocast = (
            torch.autocast(self.device, torch.bfloat16) if self.half else contextlib.nullcontext()
        )

        def draw() -> tuple[torch.Tensor, ...]:
            noise_BCHW = torch.randn(given[0][0].shape, device=self.device)
            batch = len(noise_BCHW)
            index_B = torch.randint(steps, (batch,), device=self.device)
            return noise_BCHW, 1 - index_B / steps, torch.rand(batch, device=self.device) >= 0.1

        count = 0

        def call() -> tuple[float, ...]:
            nonlocal count
            noise_BCHW, sigma_B, keep_B = given[count] if count < len(given) else draw()
            count += 1
            with autocast:
                targets = (
                    (model.codes(_scaled(views[0])), model.latents(_scaled(views[1])))
                    if online
                    else views
                )
                losses = model.joint_loss(
                    tokens_BL,
                    mask_BL,
                    span_B,
                    *targets,
                    noise_BCHW,
                    sigma_B,
                    image_token_offset=self.task.image_token_offset,
                    keep_B=keep_B,
                )
            cross_entropy, flow = losses
            (cross_entropy + flow).backward()
            torch.nn.utils.clip_grad_norm_(trained, optimizer.clip_norm)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            adamw.param_groups[0]["lr"] = rate
            return tuple(loss.detach().item() for loss in losses)

        return self._prepared(
            call, lambda v: {"losses": np.array(v, np.float32)}, checks=len(given)
        )

    def _trained(self, model: Blip3o) -> list[torch.nn.Parameter]:
        ar, dit = _part(model, "ar"), _part(model, "dit")
        # What the joint stage trains of the diffusion head (train/stages.py).
        captions = {
            name.rpartition(".")[0]: None
            for group in groups("dit", model.cfg)
            for name in group.tensors
            if any("caption" in path for path in group.shapes)
        }
        trained = [
            p
            for module in (ar, _part(model, "connector"), *map(dit.get_submodule, captions))
            for p in module.float().requires_grad_().parameters()
        ]
        if model.cfg.ar.remat != "none":
            ar.gradient_checkpointing_enable()
            ar.train()  # where checkpointing is on; nothing else depends on it
        if model.cfg.dit.remat != "none":
            dit.enable_gradient_checkpointing()
        return trained

    def _draws(self, inputs: Arrays, step: int) -> tuple[torch.Tensor, ...]:
        return (
            self._image(inputs["noise"][step]),
            self._put(inputs["sigma"][step]),
            self._put(inputs["keep"][step]),
        )

    def _ar_decode(self, inputs: Arrays) -> Prepared:
        """Build `generate` with a second forward pass for the hidden states."""
        model = self._model("ar")
        self._compile(model, "ar")
        if self.compiled:
            _part(model, "ar").generation_config.cache_implementation = "static"
        tokens_BL, lengths_B = self._put(inputs["prompts"]), self._put(inputs["lengths"])
        settings = self.task.settings
        return self._prepared(
            lambda: model.generate_image_tokens(
                tokens_BL,
                lengths_B,
                image_token_offset=self.task.image_token_offset,
                settings=settings,
            )
        )

    def _dit_step(self, inputs: Arrays) -> Prepared:
        model = self._model("connector", "dit")
        self._compile(model, "connector", "dit")
        hidden_BTD, noise_BCHW = self._put(inputs["hidden"]), self._image(inputs["start"])

        @torch.no_grad()
        def call() -> torch.Tensor:
            keep_B = torch.zeros(len(hidden_BTD), dtype=torch.bool, device=self.device)
            condition_BTC, null_BTC = (
                model.condition(hidden_BTD),
                model.condition(hidden_BTD, keep_B),
            )
            settings = self.task.settings
            return model.sample_latents(
                condition_BTC,
                null_BTC,
                noise_BCHW,
                steps=settings.steps,
                guidance=settings.guidance,
            )

        return self._prepared(call, lambda z: {"latents": _channels_last(z)})

    def _vae_encode(self, inputs: Arrays) -> Prepared:
        model = self._model("vae")
        self._compile(model, "vae")
        x_BCHW = self._image(inputs["pixels"])
        return self._prepared(
            lambda: model.latents(_scaled(x_BCHW)), lambda z: {"latents": _channels_last(z)}
        )

    def _vae_decode(self, inputs: Arrays) -> Prepared:
        model = self._model("vae")
        self._compile(model, "vae")
        z_BCHW = self._image(inputs["latents"])
        return self._prepared(lambda: model.pixels(z_BCHW), lambda x: {"pixels": _channels_last(x)})

    def _tokenizer(self, inputs: Arrays) -> Prepared:
        model = self._model("tokenizer")
        self._compile(model, "tokenizer")
        x_BCHW = self._image(inputs["tokenizer_pixels"])
        return self._prepared(
            lambda: model.codes(_scaled(x_BCHW)), lambda ids: {"ids": ids.cpu().numpy()}
        )

    def _text_to_image(self, inputs: Arrays) -> Prepared:
        model = self._model("ar", "connector", "dit", "vae")
        self._compile(model, "ar", "connector", "dit", "vae")
        if self.compiled:
            _part(model, "ar").generation_config.cache_implementation = "static"
        tokens_BL, lengths_B = self._put(inputs["prompts"]), self._put(inputs["lengths"])
        seeds = iter(range(2**32))

        def call() -> np.ndarray:
            x_BCHW = model.text_to_image(
                tokens_BL,
                lengths_B,
                image_token_offset=self.task.image_token_offset,
                settings=self.task.settings,
                seed=next(seeds),
            )
            return (x_BCHW * 255).round().to(torch.uint8).cpu().numpy()

        return self._prepared(call)


def _scaled(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 127.5 - 1


def _channels_last(x_BCHW: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x_BCHW.float().cpu().numpy(), 1, -1)


def _part(model: Blip3o, name: str) -> Any:
    """Return a part; the classes of transformers and diffusers have no usable types."""
    return model.get_submodule(name)
