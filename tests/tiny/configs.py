"""Configure the smallest run that has every part."""

import dataclasses
import pathlib

from blip3o_jax import config

F32 = {"dtype": "float32"}


def model() -> config.ModelConfig:
    """Return a model of 16 px images: 16 latents of 4 channels, 4 image tokens out of 32 codes.
    Widths divide by 8, so that they shard."""
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
    """Return a joint run over the data set at `path`; `changes` are fields of Config, those of a
    group given as a dict."""
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
    return replace_fields(base, changes)


def replace_fields(value: object, changes: dict[str, object]) -> object:
    nested = {
        name: replace_fields(getattr(value, name), change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return dataclasses.replace(value, **nested)
