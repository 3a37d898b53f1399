"""Compile the joint step of a small model for four TPUs and print the FLOPs that the cost model
finds in it, as JSON; a separate program, since the TPU compiler takes over the signals of the
process that loads it."""

import json

from blip3o_jax import config
from blip3o_jax.bench.sharding import topology
from blip3o_jax.bench.sharding.compiled_step import Task, compile_step

WHERE = topology.parse("v5e:2x2")


def run_config() -> config.Config:
    """Return a model with all parts and kinds of layer of the published one, wide enough for
    products to stay products, and without recomputation."""
    return config.Config(
        stage="joint",
        model=config.ModelConfig(
            image_size=64,
            tokenizer=config.TaTokConfig(
                encoder=config.SiglipVisionConfig(128, 256, 4, 4, image_size=112),
                decoder=config.TaTokDecoderConfig(128, 256, 1, 2, num_patches=64),
                bottleneck_dim=128,
                codebook_size=1024,
            ),
            ar=config.Qwen3Config(2048, 256, 512, 3, 4, 2, remat="none"),
            dit=config.SanaConfig(
                num_layers=3,
                num_attention_heads=8,
                num_cross_attention_heads=4,
                cross_attention_head_dim=64,
                cross_attention_dim=256,
                caption_channels=384,
                remat="none",
            ),
            vae=config.DcAeConfig(
                encoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
                decoder_block_types=("ResBlock",) * 3,
                encoder_block_out_channels=(64, 128, 256),
                decoder_block_out_channels=(64,) * 3,
                encoder_layers_per_block=(2, 2, 2),
                decoder_layers_per_block=(1,) * 3,
                encoder_qkv_multiscales=((), (), (5,)),
                decoder_qkv_multiscales=((),) * 3,
            ),
        ),
        data=config.DataConfig(batch_size=128, max_length=256),
        loss=config.LossConfig(ce_chunk=256, flow_samples=2),
        mesh=config.MeshConfig(fsdp=4),
    )


def main() -> None:
    row = compile_step(Task(run_config(), WHERE))
    flops = {
        part: {name: value * WHERE.devices for name, value in passes.items()}
        for part, passes in row["flops"].items()
    }
    print(json.dumps(flops))


if __name__ == "__main__":
    main()
