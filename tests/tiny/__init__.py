"""Build the smallest run that has every part: configuration, data, batches, meshes, checkpoint.

The tests of training, data, sampling and conversion share it.
"""

from tests.tiny.batches import cached_batch, prepared
from tests.tiny.checkpoints import write_checkpoint
from tests.tiny.configs import F32, model, replace_fields, run_config
from tests.tiny.datasets import CAPTIONS, data, images, scratch, write_data
from tests.tiny.meshes import MESHES, strategy

__all__ = [
    "CAPTIONS",
    "F32",
    "MESHES",
    "cached_batch",
    "data",
    "images",
    "model",
    "prepared",
    "replace_fields",
    "run_config",
    "scratch",
    "strategy",
    "write_checkpoint",
    "write_data",
]
