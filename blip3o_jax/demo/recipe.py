"""The demo's recipe: the published architecture with every size turned down until two CPU cores train it in minutes.

Every part is the real one; what differs from configs/pretrain.py is in these fields alone: sizes, a shorter chat template, and
all of the DiT trained from random weights.
"""

import dataclasses
import math
import os

from blip3o_jax import config

IMAGE_SIZE = 64


def model() -> config.ModelConfig:
    """64 px images; 64 latents of 16 channels; 16 image tokens out of 512 codes."""
    cpu = {"dtype": "float32", "unroll": True}  # both faster on CPUs
    f32 = {"dtype": "float32"}
    return config.ModelConfig(
        image_size=IMAGE_SIZE,
        text=config.TextConfig(kind="sentencepiece", train_size=640),
        template=config.TemplateConfig(system="", generate="{caption}"),
        tokenizer=config.TaTokConfig(
            encoder=config.SiglipVisionConfig(
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=IMAGE_SIZE,
                patch_size=16,
                **cpu,
            ),
            decoder=config.TaTokDecoderConfig(
                hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, num_patches=16
            ),
            bottleneck_dim=16,
            codebook_size=512,
            **f32,
        ),
        text_tower=config.TextTowerConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, **cpu
        ),
        ar=config.Qwen3Config(
            vocab_size=2048,  # set by the vocabulary
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            rope_theta=1e4,
            vocab_multiple=128,
            remat="none",
            **cpu,
        ),
        connector=config.ConnectorConfig(**f32),
        dit=config.SanaConfig(
            in_channels=16,
            out_channels=16,
            num_layers=5,
            num_attention_heads=6,
            attention_head_dim=32,
            num_cross_attention_heads=6,
            cross_attention_head_dim=32,
            cross_attention_dim=192,
            caption_channels=192,
            mlp_ratio=2.0,
            patch_size=2,
            remat="none",
            **cpu,
        ),
        vae=config.DcAeConfig(
            latent_channels=16,
            attention_head_dim=16,
            encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(16, 32, 64, 64),
            decoder_block_out_channels=(16, 32, 64, 64),
            encoder_layers_per_block=(0, 1, 1, 1),
            decoder_layers_per_block=(0, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (), (5,)),
            decoder_qkv_multiscales=((), (), (), (5,)),
            downsample_block_type="pixel_unshuffle",
            upsample_block_type="pixel_shuffle",
            scaling_factor=1.0,
            **f32,
        ),
    )


def cpu_devices() -> int:
    """One device a core, as far as every batch of the recipe divides: the largest power of two up to 8."""
    return 2 ** min(3, int(math.log2(os.cpu_count() or 1)))


def recipe(data_dir: str, cache_dir: str, *, fast: bool = False) -> dict[str, config.Config]:
    """Stage name -> configuration. `fast` takes every step of the way with too few steps to learn much."""
    base = config.Config(
        model=model(),
        data=config.DataConfig(path=data_dir, format="tfds", workers=0, prefetch=4, max_length=56),
        mesh=config.MeshConfig(data=-1, fsdp=1, strategy="dp", cpu_devices=cpu_devices()),
        log_every=20,
        preview=0,
        sampling=config.SamplingConfig(temperature=1.0, top_k=0, top_p=0.9, steps=20, guidance=2.0, batch_size=64),
    )

    def stage(name: str, steps: int, batch: int, rate: float, **changes: object) -> config.Config:
        steps = max(4, steps // 40) if fast else steps
        optimizer = {"learning_rate": rate, "end_learning_rate": rate / 50, "warmup_share": 0.05, "b2": 0.99}
        return dataclasses.replace(
            base,
            stage=name,
            steps=steps,
            data=dataclasses.replace(base.data, batch_size=batch, cache_dir=cache_dir if name == "joint" else ""),
            optimizer=config.OptimizerConfig(**optimizer | changes.pop("optimizer", {})),
            checkpoint=config.CheckpointConfig(every=steps, keep=1, init_from=changes.pop("init_from", ())),
            **changes,
        )

    return {
        "autoencoder": stage("autoencoder", 1000, 8, 3e-3, loss=config.LossConfig(latent_scale=0.01, latent_noise=0.1)),
        "contrastive": stage("contrastive", 400, 64, 2e-3),
        "tokenizer": stage("tokenizer", 300, 64, 2e-3, init_from=(("tokenizer", "contrastive"),)),
        "joint": stage(
            "joint",
            1600,
            32,
            1.5e-3,
            trainable=("ar/.*", "connector/.*", "dit/.*"),
            optimizer={"ema_decay": 0.99},
            loss=config.LossConfig(ce_chunk=64),
            init_from=(("tokenizer", "tokenizer"), ("vae", "autoencoder")),
        ),
    }
