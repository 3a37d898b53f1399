"""The demo's recipe: the published architecture with every size turned down until two CPU cores
train it in minutes.

Every part is the real one; what differs from configs/pretrain.py is in these fields alone: sizes, a
shorter chat template, all of the DiT trained, and what makes up for starting from random weights
(docs/training.md says what each of these is for).
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from blip3o_jax import config
from blip3o_jax.config.run import StageName
from blip3o_jax.train.initialize import from_checkpoint

IMAGE_SIZE = 48
PATCH = 16  # pixels along the side of an image token


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Hold the sizes of the model; the defaults are those of the demo. Widths are multiples of 64:
    heads have 32 channels, and the DiT has one and a half times the width.
    """

    width: int = 128
    ar_layers: int = 3
    dit_layers: int = 2
    codes: int = 512
    text_pieces: int = 480
    dtype: config.Dtype = "float32"


def model(
    image_size: int = IMAGE_SIZE,
    *,
    unroll: bool = True,
    references: bool = False,
    sizes: Sizes = Sizes(),
) -> config.ModelConfig:
    """Return the demo's model, by default at 48 px: 6 x 6 latents of 16 channels; 3 x 3 image
    tokens out of 512 codes, each of 16 x 16 pixels. `references`: rows have a reference slot.
    """
    # float32 and unrolled layers are faster on CPUs.
    layers: dict[str, Any] = {"dtype": sizes.dtype, "unroll": unroll}
    dtype: dict[str, Any] = {"dtype": sizes.dtype}
    width = sizes.width
    heads = width // 32
    dit_heads = heads * 3 // 2
    channels = (width // 8, width // 4, width // 2, width // 2)
    return config.ModelConfig(
        image_size=image_size,
        text=config.TextConfig(kind="sentencepiece", train_size=sizes.text_pieces),
        template=config.TemplateConfig(
            system="",
            generate="{caption}",
            edit="{instruction}<image>",
            reconstruct="<image>",
            understand="{question}<image>",
        ),
        # Concatenated latents preserve every pixel that must not change; the nine tokens of a
        # reference could not.
        editing=config.EditingConfig(reference_slots=int(references), latent_concat=references),
        tokenizer=config.TaTokConfig(
            encoder=config.SiglipVisionConfig(
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=4,
                num_attention_heads=heads,
                image_size=image_size,
                patch_size=PATCH,
                **layers,
            ),
            decoder=config.TaTokDecoderConfig(
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=3,
                num_attention_heads=heads,
                num_patches=(image_size // PATCH) ** 2,
            ),
            bottleneck_dim=16,
            codebook_size=sizes.codes,
            select_layer=-1,  # its features determine each patch's pixels
            **dtype,
        ),
        text_tower=config.TextTowerConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=heads,
            **layers,
        ),
        ar=config.Qwen3Config(
            vocab_size=2048,  # set by the vocabulary
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=sizes.ar_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=32,
            rope_theta=1e4,
            tie_word_embeddings=False,
            initializer_range=0.08,
            embedding_range=0.8,
            vocab_multiple=128,
            remat="none",
            **layers,
        ),
        flow=config.FlowConfig(shift=3.0),  # most steps where the picture is laid out
        connector=config.ConnectorConfig(positions=True, **dtype),
        dit=config.SanaConfig(
            in_channels=16,
            out_channels=16,
            num_layers=sizes.dit_layers,
            num_attention_heads=dit_heads,
            attention_head_dim=32,
            num_cross_attention_heads=dit_heads,
            cross_attention_head_dim=32,
            cross_attention_dim=32 * dit_heads,
            caption_channels=32 * dit_heads,
            mlp_ratio=2.0,
            sample_size=image_size // 8,
            patch_size=2,
            interpolation_scale=1.0,
            remat="none",
            **layers,
        ),
        vae=config.DcAeConfig(
            latent_channels=16,
            attention_head_dim=16,
            encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_layers_per_block=(0, 1, 1, 1),
            decoder_layers_per_block=(0, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (), (5,)),
            decoder_qkv_multiscales=((), (), (), (5,)),
            downsample_block_type="pixel_unshuffle",
            upsample_block_type="pixel_shuffle",
            scaling_factor=1.0,
            **dtype,
        ),
    )


def cpu_devices() -> int:
    """Return the number of CPU devices: one per core, rounded down to a power of two up to 8, so
    that every batch of the recipe divides.
    """
    return 2 ** min(3, int(math.log2(os.cpu_count() or 1)))


def mesh() -> config.MeshConfig:
    return config.MeshConfig(data=-1, fsdp=1, strategy="dp", cpu_devices=cpu_devices())


def mixture(
    data_dir: str, tasks: Mapping[str, str | pathlib.Path]
) -> tuple[config.SourceConfig, ...]:
    """Return the sources of the joint stage. Questions take the longest to learn, since the labels
    of their rows are an answer of a word or two.
    """
    edits, questions = (str(tasks[name]) for name in ("edits", "questions"))
    return (
        config.SourceConfig(path=data_dir, weight=0.42),
        config.SourceConfig(path=edits, weight=0.2),
        config.SourceConfig(path=questions, weight=0.33),
        config.SourceConfig(path=data_dir, weight=0.05, task="reconstruct"),
    )


SAMPLING = config.SamplingConfig(
    temperature=0.8,
    top_k=0,
    top_p=1.0,
    steps=20,
    guidance=2.0,
    token_guidance=1.5,
    batch_size=64,
)


def fast_steps(steps: int) -> int:
    """Return the steps of a smoke run in place of `steps`: too few to learn much."""
    return max(4, steps // 100)


class Extent(NamedTuple):
    """Hold how long a stage trains: steps, examples of a batch, tokens of a row."""

    steps: int
    batch_size: int
    max_length: int

    def fast(self) -> "Extent":
        """Return the extent of a smoke run."""
        return self._replace(steps=fast_steps(self.steps))


def stages(
    base: config.Config, extents: Mapping[str, Extent], cache_dir: str
) -> dict[str, config.Config]:
    """Return the stages that train every part of `base.model` from random weights, one after the
    other, on `base.data`.
    """

    def stage(name: StageName, rate: float, **changes: Any) -> config.Config:
        steps, batch_size, max_length = extents[name]
        optimizer: dict[str, Any] = {
            "learning_rate": rate,
            "end_learning_rate": rate / 50,
            "warmup_fraction": 0.05,
            "b2": 0.99,
        }
        return dataclasses.replace(
            base,
            stage=name,
            steps=steps,
            data=dataclasses.replace(
                base.data,
                batch_size=batch_size,
                max_length=max_length,
                cache_dir=changes.pop("cache_dir", ""),
            ),
            optimizer=config.OptimizerConfig(**optimizer | changes.pop("optimizer", {})),
            checkpoint=config.CheckpointConfig(
                every=steps,
                keep=1,
                init_from=changes.pop("init_from", ()),
                image_embedding_init=changes.pop("image_embedding_init", "random"),
            ),
            **changes,
        )

    return {
        "autoencoder": stage(
            "autoencoder", 3e-3, loss=config.LossConfig(latent_scale=0.01, latent_noise=0.1)
        ),
        "contrastive": stage(
            "contrastive", 3e-3, optimizer={"name": "muon"}, loss=config.LossConfig(dense=3.0)
        ),
        "tokenizer": stage(
            "tokenizer",
            5e-3,
            trainable=("tokenizer/(?!encoder/).*",),
            init_from=(("tokenizer", "contrastive"),),
        ),
        "joint": stage(
            "joint",
            8e-3,
            cache_dir=cache_dir,
            trainable=("ar/.*", "connector/.*", "dit/.*"),
            optimizer={"name": "muon", "ema_decay": 0.98},
            loss=config.LossConfig(
                ce_chunk=extents["joint"].max_length, caption_dropout=0.1, flow_samples=2
            ),
            image_embedding_init="codes",
            init_from=(("tokenizer", "tokenizer"), ("vae", "autoencoder")),
        ),
    }


def recipe(
    data_dir: str,
    cache_dir: str,
    tasks: Mapping[str, str | pathlib.Path] | None = None,
    *,
    fast: bool = False,
) -> dict[str, config.Config]:
    """Return {stage name: configuration}. `tasks` are the files of `data.shapes.tasks`; without
    them the joint stage learns text to image alone. `fast` runs every step of the demo with too few
    steps to learn much; its layers are scanned, which compiles faster.
    """
    base = config.Config(
        model=model(unroll=not fast, references=bool(tasks)),
        data=config.DataConfig(path=data_dir, workers=0, prefetch=4),
        mesh=mesh(),
        log_every=20,
        preview=0,
        sampling=SAMPLING,
    )
    extents = {
        "autoencoder": Extent(900, 8, 40),
        "contrastive": Extent(140, 64, 24),
        "tokenizer": Extent(500, 32, 40),
        "joint": Extent(950 if tasks else 450, 64, 56 if tasks else 40),
    }
    chain = stages(base, {name: e.fast() if fast else e for name, e in extents.items()}, cache_dir)
    if tasks:
        data = dataclasses.replace(chain["joint"].data, path="", sources=mixture(data_dir, tasks))
        chain["joint"] = dataclasses.replace(chain["joint"], data=data)
    return chain


def reinforcement(
    checkpoint: str | pathlib.Path, prompts_file: str, *, fast: bool = False
) -> config.Config:
    """Return the configuration of the reinforcement learning after the recipe: GRPO on the image
    tokens with the scorer as reward. Images are sampled as for a user, but at temperature 1, so
    that the images of a prompt differ more, and in half the denoising steps, which are enough to
    distinguish a right image from a wrong one (docs/results/rl-cpu.md has the alternatives).
    """
    checkpoint_config = from_checkpoint(checkpoint, trained=("ar",))
    steps = 2 if fast else 230
    return dataclasses.replace(
        checkpoint_config,
        steps=steps,
        log_every=1,
        preview=0,
        optimizer=config.OptimizerConfig(
            learning_rate=1.5e-4,
            end_learning_rate=1e-5,
            warmup_fraction=0.05,
            b2=0.99,
            ema_decay=0.95,
        ),
        mesh=mesh(),
        checkpoint=dataclasses.replace(checkpoint_config.checkpoint, every=steps, keep=1),
        rl=config.RlConfig(
            prompts_file=prompts_file,
            num_prompts=2 if fast else 16,
            num_generations=16,
            rollout=dataclasses.replace(
                checkpoint_config.sampling, temperature=1.0, steps=10, batch_size=256
            ),
            scale_rewards="none",
            rewards=(config.RewardConfig(name="shapes"),),
        ),
    )
