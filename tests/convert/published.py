"""Random models in files as they are published, made from the stock classes and without this
package's exporter.

What such a directory may be like is `Options`; the names are those of the stock classes' state
dicts behind the prefixes of the published layout, written down here once more.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import safetensors.torch
import torch

from blip3o_jax import config
from blip3o_jax.config import Config, ModelConfig, TextConfig
from blip3o_jax.convert import importer, torch_model
from blip3o_jax.parallel.rules import Strategy
from blip3o_jax.text import tokenizers
from blip3o_jax.text.tokenizers import load_tokenizer, train_sentencepiece
from blip3o_jax.train import checkpoint, loop
from blip3o_jax.train.state import StatePlan, plan_state
from tests.text.test_tokenizers import CAPTIONS, write_bpe

PREFIXES = {
    "tokenizer": "model.vision_tower.vision_tower.",
    "ar": "",
    "connector": "model.diffusion_connector.",
    "dit": "model.sana.",
    "vae": "model.sana_vae.",
    "latent_connector": "model.und_image_vae_connector.",
    "feature_connector": "model.tar_siglip_features_connector.",
}
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CODES = 32


@dataclasses.dataclass(frozen=True)
class Options:
    """Hold what published directories differ in. `seed` is for the sizes and the values."""

    seed: int = 0
    dtype: str = "bfloat16"
    mixed: bool = False  # single tensors of each part in other dtypes
    shards: int = 1
    text: str = "bpe"  # or "sentencepiece"
    named_tokens: bool = True  # tokenizer.json holds <im_start> .. <I31> (bpe only)
    tied: bool = True
    stored_head: bool = False  # of a tied model
    spare_rows: int = 0
    latent_connector: bool = False
    feature_connector: bool = False
    noise_connector: bool = False
    scale_layer: bool = True
    flat_decoder: bool = False
    nested_encoder: bool = False
    qk_norm: bool = True
    vae: str = "f4"  # a key of AUTOENCODERS

    def __str__(self) -> str:
        """Return the values other than the defaults, for the id of a test."""
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }
        return ",".join(f"{name}={value}" for name, value in changed.items()) or "plain"


def _autoencoder(
    channels: tuple[int, ...], layers: tuple[int, ...], **changes: object
) -> config.DcAeConfig:
    n = len(channels)
    fields = {f"{side}_block_out_channels": channels for side in ("encoder", "decoder")}
    fields |= {f"{side}_layers_per_block": layers for side in ("encoder", "decoder")}
    fields |= {f"{side}_block_types": ("ResBlock",) * n for side in ("encoder", "decoder")}
    fields |= {f"{side}_qkv_multiscales": ((),) * n for side in ("encoder", "decoder")}
    return config.DcAeConfig(
        latent_channels=4, attention_head_dim=4, scaling_factor=0.5, **fields | changes
    )


_MIXED = ("ResBlock", "EfficientViTBlock", "EfficientViTBlock")
AUTOENCODERS = {
    # Both kinds of block, none to two scales; then the first stage empty; the library's other
    # resampling; two stages.
    "f4": _autoencoder(
        (8, 8, 16),
        (1, 2, 1),
        encoder_block_types=_MIXED,
        decoder_block_types=_MIXED,
        encoder_qkv_multiscales=((), (), (3, 5)),
        decoder_qkv_multiscales=((), (5,), ()),
        encoder_layers_per_block=(2, 1, 1),
    ),
    "empty": _autoencoder(
        (8, 8, 8), (0, 1, 2), decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock")
    ),
    "shuffled": _autoencoder(
        (4, 8, 8),
        (1, 2, 1),
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
    ),
    "f2": _autoencoder((8, 16), (1, 1), decoder_layers_per_block=(2, 3)),
}


def model(options: Options, vocab_size: int = 1) -> ModelConfig:
    """Return sizes drawn for the seed; widths of the parts differ, depths are 1 to 3."""
    rng = np.random.default_rng(options.seed)
    draw = lambda *choices: choices[rng.integers(len(choices))]
    heads, head_dim, kv = draw(2, 4), draw(4, 8), draw(1, 2)
    dit_heads = draw(4, 6)
    return ModelConfig(
        image_size=16,
        text=TextConfig(kind=options.text),
        tokenizer=config.TaTokConfig(
            encoder=config.SiglipVisionConfig(
                hidden_size=draw(8, 16),
                intermediate_size=draw(12, 20),
                num_hidden_layers=draw(2, 3),
                num_attention_heads=2,
                image_size=draw(16, 18),
                patch_size=8,
            ),
            decoder=config.TaTokDecoderConfig(
                hidden_size=draw(12, 24),
                intermediate_size=10,
                num_hidden_layers=draw(1, 2),
                num_attention_heads=2,
                num_patches=4,
            ),
            bottleneck_dim=draw(6, 8),
            codebook_size=CODES,
        ),
        ar=config.Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=draw(16, 24),
            intermediate_size=draw(20, 32),
            num_hidden_layers=draw(1, 2, 3),
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=head_dim,
            rope_theta=draw(1e4, 1e6),
            tie_word_embeddings=options.tied,
        ),
        dit=config.SanaConfig(
            in_channels=4,
            out_channels=4,
            num_layers=draw(1, 2),
            num_attention_heads=dit_heads,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=2 * dit_heads,
            cross_attention_dim=4 * dit_heads,
            caption_channels=draw(10, 14),
            mlp_ratio=draw(2.0, 2.5),
            sample_size=16 // AUTOENCODERS[options.vae].spatial_compression,
            qk_norm="rms_norm_across_heads" if options.qk_norm else None,
        ),
        vae=AUTOENCODERS[options.vae],
    )


@dataclasses.dataclass(frozen=True)
class Published:
    """Hold a published directory: its `tensors` by name, and the `arguments` of `open_source`."""

    directory: pathlib.Path
    model: ModelConfig
    config: dict[str, object]
    tensors: dict[str, torch.Tensor]
    arguments: dict[str, pathlib.Path]


def write(place: pathlib.Path, options: Options, base: ModelConfig | None = None) -> Published:
    """Write a BLIP3o-NEXT directory `place`/model, and next to it the files of the sizes it lacks:
    ta_tok.json, and sana/ with configurations alone. `base`: a model with sizes other than those
    of the seed.
    """
    directory = place / "model"
    directory.mkdir(parents=True)
    text_rows = write_text(directory, options)
    cfg = base or model(options)
    rows = text_rows + 5 + cfg.tokenizer.codebook_size + options.spare_rows
    cfg = dataclasses.replace(
        cfg, ar=dataclasses.replace(cfg.ar, vocab_size=rows, tie_word_embeddings=options.tied)
    )
    tensors = state_dict(cfg, options)
    save(directory, "model", tensors, options.shards)
    values = config_json(cfg, text_rows, options)
    write_json(directory / "config.json", values)
    write_diffusion(place / "sana", cfg, None)
    write_json(place / "ta_tok.json", ta_tok_sizes(cfg))
    arguments = {"diffusion": place / "sana", "ta_tok_config": place / "ta_tok.json"}
    return Published(directory, cfg, values, tensors, arguments)


def write_text(directory: pathlib.Path, options: Options) -> int:
    """Write the text tokenizer's files; return how many ids are text."""
    if options.text == "sentencepiece":
        return train_sentencepiece(CAPTIONS, directory / "tokenizer.model", 400).size
    write_bpe(directory)
    size = load_tokenizer(TextConfig("bpe", str(directory))).size
    if options.named_tokens:
        names = [
            "<im_start>",
            "<im_end>",
            *(f"<S{i}>" for i in range(3)),
            *(f"<I{i}>" for i in range(CODES)),
        ]
        write_bpe(directory, added=names)
    return size


def state_dict(cfg: ModelConfig, options: Options) -> dict[str, torch.Tensor]:
    """Return every tensor under its published name, with random values."""
    tensors = {}
    for part, prefix in PREFIXES.items():
        if part in ("latent_connector", "feature_connector") and not getattr(options, part):
            continue
        for key, value in random_part(part, cfg, options).items():
            if part == "tokenizer" and options.flat_decoder:
                key = key.replace("decoder.vision_model.", "decoder.")
            if part == "tokenizer" and options.nested_encoder and key.startswith("encoder."):
                key = "encoder.vision_model." + key.removeprefix("encoder.")
            tensors[prefix + key] = value
    if options.scale_layer:
        for name, value in (("shift", 0.0), ("scale", 1.0)):
            tensors[f"{PREFIXES['tokenizer']}scale_layer.{name}"] = torch.full((1, 3, 1, 1), value)
    if options.noise_connector:
        noise = np.random.default_rng(options.seed)
        tensors["model.und_image_vae_as_noise_connector.0.weight"] = _random(
            (7, 4), noise, torch.bfloat16
        )
    return tensors


def random_part(part: str, cfg: ModelConfig, options: Options) -> dict[str, torch.Tensor]:
    """Return the state dict of one stock class; of a tied AR, with lm_head where it is stored."""
    rng = np.random.default_rng([options.seed, *part.encode()])
    dtypes = [getattr(torch, options.dtype)] * 3 + [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ] * options.mixed
    shapes = {key: value.shape for key, value in torch_model.part(part, cfg).state_dict().items()}
    values = {
        key: _random(shape, rng, dtypes[rng.integers(len(dtypes))]) for key, shape in shapes.items()
    }
    if part == "ar" and options.tied:
        del values[HEAD]
        if options.stored_head:
            values[HEAD] = values[EMBEDDINGS].clone()
    return values


def _random(shape: tuple[int, ...], rng: np.random.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0, 0.2, tuple(shape)).astype(np.float32)).to(dtype)


def save(
    directory: pathlib.Path,
    stem: str,
    tensors: dict[str, torch.Tensor],
    shards: int = 1,
    *,
    torch_files: bool = False,
):
    """Write one file or several with an index, by the library `safetensors` (or as torch's own
    files)."""
    suffix = "bin" if torch_files else "safetensors"
    write_file = (
        torch.save
        if torch_files
        else lambda t, path: safetensors.torch.save_file(t, path, {"format": "pt"})
    )
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        write_file(tensors, directory / f"{stem}.{suffix}")
        return
    names = [f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        write_file(
            {key: tensors[key] for key, at in weight_map.items() if at == name}, directory / name
        )
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(
        directory / f"{stem}.{suffix}.index.json",
        {"metadata": {"total_size": size}, "weight_map": weight_map},
    )


def config_json(cfg: ModelConfig, text_rows: int, options: Options) -> dict[str, object]:
    """Return Qwen3's config.json of before transformers 5, with the keys that training adds."""
    first = text_rows + 5
    return qwen3_json(cfg) | {
        "architectures": ["blip3oQwenForCausalLM"],
        "model_type": "blip3o_qwen",
        "torch_dtype": options.dtype,
        "use_cache": False,
        "mm_vision_tower": None,
        "vision_tower_pretrained": None,
        "mm_hidden_size": cfg.tokenizer.encoder.hidden_size,
        "mm_vision_select_layer": -2,
        "mm_patch_merge_type": "flat",
        "diffusion_name_or_path": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 2048,
        "image_start_tag_id": text_rows,
        "image_end_tag_id": text_rows + 1,
        "scale_start_token_id": text_rows + 2,
        "scale_end_token_id": text_rows + 4,
        "num_scale_tokens": 3,
        "image_start_token_id": first,
        "image_end_token_id": first + cfg.tokenizer.codebook_size - 1,
        "num_image_tokens": cfg.tokenizer.codebook_size,
    }


def qwen3_json(cfg: ModelConfig) -> dict[str, object]:
    names = """vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim
    rope_theta rms_norm_eps tie_word_embeddings initializer_range"""
    return {name: getattr(cfg.ar, name) for name in names.split()} | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "rope_scaling": None,
        "sliding_window": None,
        "transformers_version": "4.51.3",
        "use_cache": True,
        "use_sliding_window": False,
    }


def write_diffusion(
    directory: pathlib.Path, cfg: ModelConfig, options: Options | None
) -> dict[str, torch.Tensor]:
    """Write a SANA directory as the stock classes save it, its scheduler another class's; with
    `options` with weights, which are returned by the names of a BLIP3o-NEXT directory.
    """
    tensors = {}
    for folder, part in (("transformer", "dit"), ("vae", "vae")):
        torch_model.part(part, cfg).save_config(directory / folder)
        if options is not None:
            values = random_part(part, cfg, options)
            save(directory / folder, "diffusion_pytorch_model", values, options.shards)
            tensors |= {PREFIXES[part] + key: value for key, value in values.items()}
    (directory / "scheduler").mkdir()
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "flow_shift": 3.0,
        "lambda_min_clipped": -np.inf,
    }
    write_json(
        directory / "scheduler" / "scheduler_config.json",
        scheduler | {"prediction_type": "flow_prediction"},
    )
    return tensors


def ta_tok_sizes(cfg: ModelConfig) -> dict[str, object]:
    """Return what --ta_tok_config takes."""
    tokenizer = config.to_dict(cfg.tokenizer)
    own = ("dtype", "param_dtype", "remat", "unroll")
    sizes = {
        side: {k: v for k, v in tokenizer[side].items() if k not in own}
        for side in ("encoder", "decoder")
    }
    return sizes | {
        "bottleneck_dim": tokenizer["bottleneck_dim"],
        "codebook_size": tokenizer["codebook_size"],
    }


def read(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a directory's safetensors files, by the library of that name."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        new = safetensors.torch.load_file(file)
        assert not set(new) & set(tensors)
        tensors |= new
    return tensors


def check_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Check that names, shapes, dtypes and bits are the same."""
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    for key, value in want.items():
        assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(
            *(t.contiguous().reshape(-1).view(torch.uint8) for t in (got[key], value))
        ), key


def write_json(path: pathlib.Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def text_ids(directory: pathlib.Path) -> list[list[int]]:
    """Return what the tokenizer of a directory makes of some texts."""
    kind = "sentencepiece" if (directory / tokenizers.SENTENCEPIECE_FILE).is_file() else "bpe"
    tokenizer = load_tokenizer(TextConfig(kind, str(directory)))
    return [tokenizer.encode(text) for text in CAPTIONS]


@pytest.fixture(scope="module")
def planned_once() -> Iterator[Callable[[Config, Strategy], StatePlan]]:
    """Cache `plan_state`, which traces the whole model, once for each model and place: else it is
    most of what these tests take.
    """
    cached = functools.cache(plan_state)
    plan = lambda cfg, strategy: cached(
        dataclasses.replace(cfg, mesh=config.MeshConfig()), strategy
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpoint, importer, loop):
            patch.setattr(module, "plan_state", plan)
        yield plan
