r"""Make a model of 50 million parameters with the proportions of the published one, for `blip3o
bench peer` on two CPU cores.

Command:
    blip3o data shapes --out=runs/peer/shapes --num_train=200 --num_validation=10 --num_test=10
    blip3o train --config=configs/peer.py --config.data.path=runs/peer/shapes \
        --workdir=runs/peer/train
    blip3o convert export --source=runs/peer/train --out=runs/peer/hf
    blip3o convert import --source=runs/peer/hf --out=runs/peer/jax
    blip3o bench peer --torch=runs/peer/hf --jax=runs/peer/jax --out=runs/peer/report
Hardware: two CPU cores, no accelerator.
Duration: two minutes for the weights, which are almost random after one step, and eight for the
    comparison with --eager_only; with compiled PyTorch longer.
Expected: the ratios in docs/results/peer-cpu.md.
"""

from blip3o_jax import config

F32 = {"dtype": "float32"}
CPU = {"unroll": True, **F32}  # unrolled layers are faster on CPUs


def get_config() -> config.Config:
    """Return the run at 320 px: 10 x 10 latents of 32 channels, 32 times smaller; 10 x 10 image
    tokens out of 4096 codes.
    """
    model = config.ModelConfig(
        image_size=320,
        text=config.TextConfig(kind="sentencepiece", train_size=480),
        tokenizer=config.TaTokConfig(
            encoder=config.SiglipVisionConfig(
                hidden_size=256,
                intermediate_size=960,
                num_hidden_layers=8,
                num_attention_heads=4,
                image_size=140,
                **CPU,
            ),
            decoder=config.TaTokDecoderConfig(
                hidden_size=256,
                intermediate_size=704,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_patches=100,
            ),
            bottleneck_dim=128,
            codebook_size=4096,
            **F32,
        ),
        ar=config.Qwen3Config(
            hidden_size=384,
            intermediate_size=1152,
            num_hidden_layers=12,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=64,
            remat="none",
            **CPU,
        ),
        connector=config.ConnectorConfig(**F32),
        dit=config.SanaConfig(
            num_layers=8,
            num_attention_heads=10,
            num_cross_attention_heads=5,
            cross_attention_head_dim=64,
            cross_attention_dim=320,
            caption_channels=384,
            sample_size=10,
            remat="none",
            **CPU,
        ),
        vae=config.DcAeConfig(
            encoder_block_out_channels=(32, 64, 128, 128, 256, 256),
            decoder_block_out_channels=(32, 64, 128, 128, 256, 256),
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            **CPU,
        ),
    )
    return config.Config(
        steps=1,
        model=model,
        data=config.DataConfig(batch_size=4, max_length=256, workers=0),
        loss=config.LossConfig(ce_chunk=256),
        mesh=config.MeshConfig(data=-1, fsdp=1, strategy="dp"),
        sampling=config.SamplingConfig(steps=20, batch_size=4),
    )
