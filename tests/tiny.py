"""The smallest run that has every part: what the tests of training, data flow and composition
share.
"""

import atexit
import dataclasses
import functools
import io
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from blip3o_jax import config
from blip3o_jax.data.examples import ExampleBuilder
from blip3o_jax.data.loader import Loader
from blip3o_jax.data.sources import open_mixture
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.train.checkpoint import Checkpoints
from blip3o_jax.train.stages import STAGES
from blip3o_jax.train.state import create_state, plan_state
from blip3o_jax.train.vocabulary import with_vocabulary

F32 = {"dtype": "float32"}
CAPTIONS = tuple(
    f"a {size} {colour} {shape}"
    for size, colour, shape in zip(
        ["small", "big"] * 8,
        ["red", "blue", "green", "pink"] * 4,
        ["cat"] * 3 + ["tall tree"] * 6 + ["boat on a lake"] * 7,
        strict=True,
    )
)


def model() -> config.ModelConfig:
    """16 px images: 16 latents of 4 channels, 4 image tokens out of 32 codes. Widths divide by 8,
    so that they shard.
    """
    return config.ModelConfig(
        image_size=16,
        text=config.TextConfig(kind="sentencepiece", train_size=320),
        template=config.TemplateConfig(
            system="",
            generate="{caption}",
            edit="{instruction}<image>",
            edit_several="{instruction}<image>",
            reconstruct="<image>",
            understand="<image>{question}",
        ),
        tokenizer=config.TaTokConfig(
            encoder=config.SiglipVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
                **F32,
            ),
            decoder=config.TaTokDecoderConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_patches=4,
            ),
            bottleneck_dim=8,
            codebook_size=32,
            **F32,
        ),
        text_tower=config.TextTowerConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **F32
        ),
        ar=config.Qwen3Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_multiple=8,
            remat="none",
            **F32,
        ),
        connector=config.ConnectorConfig(**F32),
        dit=config.SanaConfig(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=16,
            mlp_ratio=2.0,
            remat="none",
            **F32,
        ),
        vae=config.DcAeConfig(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(0, 1, 1),
            decoder_layers_per_block=(0, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            scaling_factor=0.5,
            **F32,
        ),
    )


def run_config(path: str | pathlib.Path = "", **changes: object) -> config.Config:
    """A joint run over the data set at `path`; `changes` are fields of Config, those of a group
    given as a dict.
    """
    base = config.Config(
        steps=6,
        log_every=1,
        model=model(),
        data=config.DataConfig(path=str(path), batch_size=8, max_length=32, workers=0),
        optimizer=config.OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.2),
        loss=config.LossConfig(ce_chunk=8),
        mesh=config.MeshConfig(data=-1, fsdp=1, strategy="dp"),
        checkpoint=config.CheckpointConfig(every=100),
    )
    return _replaced(base, changes)


def _replaced(value: object, changes: dict[str, object]) -> object:
    nested = {
        name: _replaced(getattr(value, name), change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return dataclasses.replace(value, **nested)


def images(count: int = len(CAPTIONS), seed: int = 0) -> list[bytes]:
    """PNG files of smooth colours, not square."""
    rng = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        corners = Image.fromarray(rng.integers(0, 256, (2, 3, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        corners.resize((24, 20), Image.Resampling.BICUBIC).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def write_data(directory: pathlib.Path, captions: tuple[str, ...] = CAPTIONS) -> pathlib.Path:
    """A folder with captions.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (data, caption) in enumerate(zip(images(len(captions)), captions, strict=True)):
        (directory / f"{i:03d}.png").write_bytes(data)
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "caption": caption}))
    (directory / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


@functools.cache
def data() -> pathlib.Path:
    """The folder, written once a test session."""
    return write_data(scratch() / "images")


def scratch() -> pathlib.Path:
    """A directory for this test session."""
    path = tempfile.mkdtemp(prefix="blip3o-tiny-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return pathlib.Path(path)


@functools.cache
def prepared(
    stage: str = "joint", supervise_prompt: bool = False, references: int = 0
) -> tuple[config.Config, int, dict[str, np.ndarray]]:
    """(configuration with its vocabulary, id of code 0, one batch of 8 rows) of a stage."""
    model = {
        "template": {"supervise_prompt": supervise_prompt},
        "editing": {"references": references},
    }
    cfg = run_config(data(), stage=stage, model=model)
    sources = open_mixture(cfg.data)
    cfg, vocabulary = with_vocabulary(cfg, sources, data().parent)
    loader = Loader(
        sources,
        ExampleBuilder(STAGES[stage].fields, cfg.model, cfg.data, vocabulary),
        cfg.data,
        cfg.seed,
    )
    batch = next(loader)
    loader.close()
    return cfg, vocabulary.image_first if vocabulary else 0, batch


def strategy(
    name: str = "dp", data: int = 1, fsdp: int = 1, tensor: int = 1, **mesh: Any
) -> Strategy:
    """A strategy on as many devices as the sizes come to."""
    cfg = config.MeshConfig(data=data, fsdp=fsdp, tensor=tensor, strategy=name, **mesh)
    return Strategy.of(cfg, jax.devices()[: data * fsdp * tensor * cfg.sequence])


# Each strategy on eight devices.
MESHES: dict[str, dict[str, Any]] = {
    "dp": {"name": "dp", "data": 8},
    "fsdp": {"name": "fsdp", "fsdp": 8},
    "fsdp_tp": {"name": "fsdp_tp", "data": 2, "fsdp": 2, "tensor": 2},
    "fsdp_sp": {"name": "fsdp_sp", "data": 2, "fsdp": 2, "sequence": 2},
    "hybrid": {"name": "hybrid", "data": 2, "fsdp": 4, "slices": 2},
    "hybrid_fsdp_tp": {"name": "hybrid_fsdp_tp", "data": 2, "fsdp": 2, "tensor": 2, "slices": 2},
    "hybrid_fsdp_sp": {"name": "hybrid_fsdp_sp", "data": 2, "fsdp": 2, "sequence": 2, "slices": 2},
    "a mixture": {
        "name": "fsdp_tp",
        "fsdp": 4,
        "tensor": 2,
        "parts": (("dit", "fsdp"), ("tokenizer", "dp"), ("vae", "fsdp")),
    },
}


def cached_batch(
    cfg: config.Config, batch: dict[str, np.ndarray], seed: int = 0
) -> dict[str, np.ndarray]:
    """A joint batch as it comes from the encoders' cache, with made-up codes and latents: no
    encoder runs in the step.
    """
    rng = np.random.default_rng(seed)
    rows, side = len(batch["tokens"]), cfg.model.latent_size
    views = {
        "codes": rng.integers(
            0, cfg.model.tokenizer.codebook_size, (rows, cfg.model.tokenizer.num_tokens), np.int32
        ),
        "latents": rng.normal(size=(rows, side, side, cfg.model.vae.latent_channels)).astype(
            np.float32
        ),
    }
    return {name: x for name, x in batch.items() if "pixels" not in name} | views


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Programs that run a few times on tiny arrays: compiling them is all the time they take."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def write_checkpoint(workdir: pathlib.Path, **changes: object) -> None:
    """What a joint run over `data()` leaves in its `workdir` after 6 steps, with weights that were
    not trained. `changes` as of `run_config`.

    They are drawn anew: initial weights say too little, since the AR's logits are all alike and the
    DiT's last layer is near zero. Rows hold prompts of up to 68 tokens.
    """
    cfg = run_config(data(), data={"max_length": 72}, **changes)
    cfg, vocabulary = with_vocabulary(cfg, open_mixture(cfg.data), workdir)
    state = create_state(cfg, plan_state(cfg, strategy()))
    rng = np.random.default_rng(1)
    state["params"] = jax.tree.map(
        lambda x: jax.device_put(
            np.asarray(x) + rng.normal(0, 0.3, x.shape).astype(x.dtype), x.sharding
        ),
        state["params"],
    )
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.open(cfg, vocabulary.tokenizer)
    checkpoints.save(6, state, {"next_example": 0}, 1.0)
    checkpoints.close()
