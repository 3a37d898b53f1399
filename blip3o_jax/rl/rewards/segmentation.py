"""Detect objects for GenEval with models of the transformers library: an instance segmentation
model (the official one is Mask2Former on COCO) and a CLIP that names the colour of a crop. Both
come from local directories and run on one thread.

Colours follow the benchmark: an object is cut out by its mask, placed on grey and cropped to its
box; its colour is the one of ten with the nearest text embedding, a mean over three templates.

Shape suffixes: H height, W width, C colour channels, N objects, K colours, D embedding.
"""

import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from blip3o_jax import checksums
from blip3o_jax.config import UserError
from blip3o_jax.config.errors import install_command
from blip3o_jax.rl.rewards.geneval_rules import COLOURS, Found

TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
GREY = 0x99
# Published checkpoints name some classes of COCO as VOC does; GenEval's prompts have longer names
# for three of them.
GENEVAL_NAMES = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
}


class SegmentationDetector:
    """Detect with the models in `path` and `colour_path`, directories as `save_pretrained` writes
    them. Objects below `threshold` are left out. The models are loaded with the first image; the
    names of the classes are read at once."""

    colours = COLOURS

    def __init__(self, path: str, colour_path: str, threshold: float):
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"reward geneval: detector=transformers needs {package}:"
                    f" {install_command('convert')}"
                )
        labels = _config("path", path).get("id2label")
        if not labels:
            raise UserError(
                f"reward geneval: {path}/config.json has no id2label; take a model that names its "
                "classes"
            )
        _config("colour_path", colour_path)
        self._names = {int(label): GENEVAL_NAMES.get(name, name) for label, name in labels.items()}
        self.classes = tuple(self._names.values())
        self.path = path
        self.threshold = threshold
        self._models: tuple[Any, ...] | None = None
        self._colours = ColourClassifier(colour_path)

    def detect(self, image_HWC: np.ndarray) -> list[Found]:
        """Return every object with its mask; the box is the mask's."""
        import torch

        self._models = self._models or _load(
            self.path, "AutoModelForUniversalSegmentation", "AutoImageProcessor"
        )
        model, processor = self._models
        with torch.inference_mode():
            outputs = model(
                **processor(
                    images=image_HWC, return_tensors="pt", input_data_format="channels_last"
                )
            )
        (result,) = processor.post_process_instance_segmentation(
            outputs,
            threshold=self.threshold,
            target_sizes=[image_HWC.shape[:2]],
            return_binary_maps=True,
        )
        found = []
        # Without any object, `segmentation` is an empty map, which has no segment: hence
        # strict=False.
        for mask, segment in zip(result["segmentation"], result["segments_info"], strict=False):
            mask_HW = mask.numpy() > 0
            if mask_HW.any():
                found.append(
                    Found(
                        self._names[segment["label_id"]], _box(mask_HW), segment["score"], mask_HW
                    )
                )
        return found

    def colours_of(self, image_HWC: np.ndarray, found: Sequence[Found]) -> list[str | None]:
        return self._colours([cut_out(image_HWC, thing) for thing in found], found[0].name)


class ColourClassifier:
    """Classify colours zero-shot by a CLIP in a local directory."""

    def __init__(self, path: str):
        self.path = path
        self._models: tuple[Any, ...] | None = None
        self._texts_KD: dict[str, np.ndarray] = {}

    def __call__(self, crops: Sequence[np.ndarray], name: str) -> list[str | None]:
        """Return the colour of each crop, uint8 RGB [h, w, 3], of an object of class `name`."""
        import torch

        self._models = self._models or _load(
            self.path, "CLIPModel", "AutoTokenizer", "AutoImageProcessor"
        )
        model, tokenizer, processor = self._models
        with torch.inference_mode():
            if name not in self._texts_KD:
                texts = [
                    t.format(colour=colour, name=name) for colour in COLOURS for t in TEMPLATES
                ]
                texts_ND = model.get_text_features(
                    **tokenizer(texts, padding=True, return_tensors="pt")
                ).pooler_output
                texts_KTD = _unit(texts_ND.numpy()).reshape(len(COLOURS), len(TEMPLATES), -1)
                self._texts_KD[name] = _unit(texts_KTD.mean(axis=1))
            pixels = processor(
                images=list(crops), return_tensors="pt", input_data_format="channels_last"
            )
            images_ND = _unit(model.get_image_features(**pixels).pooler_output.numpy())
        return [COLOURS[k] for k in (images_ND @ self._texts_KD[name].T).argmax(axis=1)]


def cut_out(image_HWC: np.ndarray, thing: Found) -> np.ndarray:
    """Return the pixels of an object on grey, cropped to its box."""
    if thing.mask_HW is None:
        raise ValueError(f"{thing.name} has no mask to cut it out by")
    x0, y0, x1, y1 = (round(edge) for edge in thing.box)
    return np.where(thing.mask_HW[..., None], image_HWC, np.uint8(GREY))[y0:y1, x0:x1]


def _box(mask_HW: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = (np.flatnonzero(mask_HW.any(axis=axis)) for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _unit(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.linalg.norm(x_ND, axis=-1, keepdims=True)


def _config(option: str, path: str) -> dict[str, Any]:
    file = pathlib.Path(path) / "config.json"
    if not path or not file.is_file():
        raise UserError(
            f"reward geneval: {option}={path!r} must be a local directory with a model's "
            "config.json and weights"
        )
    return checksums.read_json(file, edited=True)


def _load(path: str, *classes: str) -> tuple[Any, ...]:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    # Without trust_remote_code=False, transformers asks on the terminal whether to run code from
    # the directory.
    local = {"local_files_only": True, "trust_remote_code": False}
    return tuple(getattr(transformers, name).from_pretrained(path, **local) for name in classes)
