"""Every setting of every part and stage, as frozen dataclasses.

A file under configs/ returns a `Config` or an `ml_collections.ConfigDict`; `load` reads it and
replaces the fields of `--config.a.b=v` (loader.py). `to_dict` and `from_dict` go to and from the
config.json of a checkpoint (serializer.py). An unknown key, a wrong type or a value that cannot
work is an error that names the field: its annotation says what it may hold (fields.py), and what
concerns several fields is checked by the group that holds them. The string below a field is its
text in docs/settings.md. presets.py has the published sizes.
Fields of a network carry the names of the library class it matches (transformers, diffusers), so a
published config.json reads straight into them.
"""

from blip3o_jax.config.ar import (
    QWEN_LINEAR,
    LanguageModelConfig,
    Qwen2Config,
    Qwen3Config,
    QwenConfig,
)
from blip3o_jax.config.data import DataConfig, SourceConfig
from blip3o_jax.config.dit import (
    MMDIT_LINEAR,
    SANA_LINEAR,
    ConnectorConfig,
    DiffusionHeadConfig,
    FlowConfig,
    MMDiTConfig,
    SanaConfig,
)
from blip3o_jax.config.errors import ConfigError, UserError, check, check_choice
from blip3o_jax.config.fields import MODEL_TYPE, PartConfig
from blip3o_jax.config.image_tokens import (
    ImageTokenizerConfig,
    SiglipVisionConfig,
    TaTokConfig,
    TaTokDecoderConfig,
    TextTowerConfig,
)
from blip3o_jax.config.loader import Overrides, load, load_recipe
from blip3o_jax.config.lora import LoraConfig
from blip3o_jax.config.mesh import MeshConfig, StrategyName
from blip3o_jax.config.model import EditingConfig, ModelConfig
from blip3o_jax.config.presets import DIFFUSION_HEADS, LANGUAGE_MODELS, model_sizes
from blip3o_jax.config.rl import FlowPolicyConfig, RewardConfig, RlConfig
from blip3o_jax.config.run import STAGE_NAMES, Config, StageName
from blip3o_jax.config.sampling import SamplingConfig
from blip3o_jax.config.serializer import (
    flat,
    from_dict,
    replace_everywhere,
    to_config_dict,
    to_dict,
)
from blip3o_jax.config.text import TemplateConfig, TextConfig
from blip3o_jax.config.train import CheckpointConfig, LossConfig, OptimizerConfig, ScheduleConfig
from blip3o_jax.config.types import REMAT, Dtype, Part, Remat
from blip3o_jax.config.vae import AutoencoderConfig, DcAeConfig

__all__ = [
    "DIFFUSION_HEADS",
    "LANGUAGE_MODELS",
    "MMDIT_LINEAR",
    "MODEL_TYPE",
    "QWEN_LINEAR",
    "REMAT",
    "SANA_LINEAR",
    "STAGE_NAMES",
    "AutoencoderConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "ConnectorConfig",
    "DataConfig",
    "DcAeConfig",
    "DiffusionHeadConfig",
    "Dtype",
    "EditingConfig",
    "FlowConfig",
    "FlowPolicyConfig",
    "ImageTokenizerConfig",
    "LanguageModelConfig",
    "LoraConfig",
    "LossConfig",
    "MMDiTConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Overrides",
    "Part",
    "PartConfig",
    "Qwen2Config",
    "Qwen3Config",
    "QwenConfig",
    "Remat",
    "RewardConfig",
    "RlConfig",
    "SamplingConfig",
    "SanaConfig",
    "ScheduleConfig",
    "SiglipVisionConfig",
    "SourceConfig",
    "StageName",
    "StrategyName",
    "TaTokConfig",
    "TaTokDecoderConfig",
    "TemplateConfig",
    "TextConfig",
    "TextTowerConfig",
    "UserError",
    "check",
    "check_choice",
    "flat",
    "from_dict",
    "load",
    "load_recipe",
    "model_sizes",
    "replace_everywhere",
    "to_config_dict",
    "to_dict",
]
