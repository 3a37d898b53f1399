"""Every setting of every part and stage, as frozen dataclasses.

A file under configs/ returns a `Config`; `Config` values turn into an `ml_collections.ConfigDict`
(`to_config_dict`) so that `--config.a.b=v` can override a field, and back (`from_dict`), where an
unknown key, a wrong type or a value that cannot work is an error that names the field. A field's
annotation says what it may hold (fields.py); what concerns several fields is checked by the group
that holds them. Fields of a network carry the names of the library class it matches (transformers,
diffusers), so a published config.json reads straight into them.
"""

from blip3o_jax.config.autoencoder import DcAeConfig, PerStage, VaeBlock, VaeLayers, VaeScales
from blip3o_jax.config.data import DataConfig, DataFormat, SourceConfig
from blip3o_jax.config.diffusion import SANA_LINEAR, ConnectorConfig, FlowConfig, SanaConfig
from blip3o_jax.config.errors import ConfigError, UserError, check, check_choice
from blip3o_jax.config.image_tokenizer import (
    SiglipVisionConfig,
    TaTokConfig,
    TaTokDecoderConfig,
    TextTowerConfig,
)
from blip3o_jax.config.language_model import QWEN3_LINEAR, Qwen3Config
from blip3o_jax.config.loader import Overrides, load, load_recipe
from blip3o_jax.config.lora import LoraConfig
from blip3o_jax.config.mesh import MeshConfig, MeshSize, StrategyName
from blip3o_jax.config.model import EditingConfig, ModelConfig
from blip3o_jax.config.rl import ClipDown, FlowPolicyConfig, RewardConfig, RlConfig, Seconds
from blip3o_jax.config.run import STAGE_NAMES, Config, StageName
from blip3o_jax.config.sampling import Guidance, SamplingConfig
from blip3o_jax.config.serializer import flat, from_dict, to_config_dict, to_dict
from blip3o_jax.config.text import TemplateConfig, TextConfig
from blip3o_jax.config.train import CheckpointConfig, LearningRate, LossConfig, OptimizerConfig
from blip3o_jax.config.types import REMAT, BatchSize, Dtype, Part, Remat, TableRows

__all__ = [
    "QWEN3_LINEAR",
    "REMAT",
    "SANA_LINEAR",
    "STAGE_NAMES",
    "BatchSize",
    "CheckpointConfig",
    "ClipDown",
    "Config",
    "ConfigError",
    "ConnectorConfig",
    "DataConfig",
    "DataFormat",
    "DcAeConfig",
    "Dtype",
    "EditingConfig",
    "FlowConfig",
    "FlowPolicyConfig",
    "Guidance",
    "LearningRate",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "MeshSize",
    "ModelConfig",
    "OptimizerConfig",
    "Overrides",
    "Part",
    "PerStage",
    "Qwen3Config",
    "Remat",
    "RewardConfig",
    "RlConfig",
    "SamplingConfig",
    "SanaConfig",
    "Seconds",
    "SiglipVisionConfig",
    "SourceConfig",
    "StageName",
    "StrategyName",
    "TaTokConfig",
    "TaTokDecoderConfig",
    "TableRows",
    "TemplateConfig",
    "TextConfig",
    "TextTowerConfig",
    "UserError",
    "VaeBlock",
    "VaeLayers",
    "VaeScales",
    "check",
    "check_choice",
    "flat",
    "from_dict",
    "load",
    "load_recipe",
    "to_config_dict",
    "to_dict",
]
