"""Check the inputs and outputs of the detector on models of the transformers library, tiny and
random, from a local directory."""

import json
import string

import numpy as np
import pytest
import torch
import transformers

from blip3o_jax.config import UserError
from blip3o_jax.rl.rewards import geneval, segmentation
from blip3o_jax.rl.rewards.geneval_rules import COLOURS, Found

LABELS = {0: "dog", 1: "tvmonitor", 2: "mouse"}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> tuple[str, str]:
    """Return (Mask2Former, CLIP) as `save_pretrained` writes them."""
    masks, clip = tmp_path_factory.mktemp("mask2former"), tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label=LABELS,
    )
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(masks)
    transformers.Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(
        masks
    )
    vocabulary = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary += [letter + end for letter in string.ascii_lowercase + "-" for end in ("", "</w>")]
    tokenizer = transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]
    )
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(clip)
    tokenizer.save_pretrained(clip)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(clip)
    return str(masks), str(clip)


def test_objects_have_names_masks_and_the_boxes_of_their_masks(directories, rng):
    detector = segmentation.SegmentationDetector(*directories, threshold=0.0)
    assert detector.classes == ("dog", "tv", "computer mouse")
    image_HWC = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    found = detector.detect(image_HWC)
    assert found
    for thing in found:
        assert thing.name in detector.classes and 0 <= thing.confidence <= 1
        assert thing.mask_HW.shape == (40, 56) and thing.mask_HW.dtype == bool
        x0, y0, x1, y1 = (int(edge) for edge in thing.box)
        inside_HW = np.zeros_like(thing.mask_HW)
        inside_HW[y0:y1, x0:x1] = True
        assert not (thing.mask_HW & ~inside_HW).any()
        assert all(
            edge.any()
            for edge in (
                thing.mask_HW[y0],
                thing.mask_HW[y1 - 1],
                thing.mask_HW[:, x0],
                thing.mask_HW[:, x1 - 1],
            )
        )
    least = sorted(thing.confidence for thing in found)[len(found) // 2]
    fewer = segmentation.SegmentationDetector(*directories, threshold=least).detect(image_HWC)
    assert 0 < len(fewer) < len(found)
    assert segmentation.SegmentationDetector(*directories, threshold=1.0).detect(image_HWC) == []


def test_an_object_is_cut_out_on_grey():
    image_HWC = np.full((6, 8, 3), 7, np.uint8)
    mask_HW = np.zeros((6, 8), bool)
    mask_HW[1:4, 2:7] = True
    mask_HW[1, 2] = False
    crop_HWC = segmentation.cut_out(
        image_HWC, Found("dog", segmentation._box(mask_HW), 1.0, mask_HW)
    )
    want_HWC = np.full((3, 5, 3), 7, np.uint8)
    want_HWC[0, 0] = segmentation.GREY
    np.testing.assert_array_equal(crop_HWC, want_HWC)


def test_colours_are_the_nearest_text(directories, rng):
    """Compare with the library's own joint forward pass, one crop and one template at a time."""
    crops = [
        rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((20, 20), (9, 31), (16, 16))
    ]
    classifier = segmentation.ColourClassifier(directories[1])
    colours = classifier(crops, "dog")
    model = transformers.CLIPModel.from_pretrained(directories[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(directories[1])
    processor = transformers.CLIPImageProcessorPil.from_pretrained(directories[1])
    want = []
    for crop in crops:
        sums = 0
        for template in segmentation.TEMPLATES:
            texts = tokenizer(
                [template.format(colour=c, name="dog") for c in COLOURS],
                padding=True,
                return_tensors="pt",
            )
            with torch.inference_mode():
                outputs = model(
                    **texts,
                    **processor(
                        images=[crop], return_tensors="pt", input_data_format="channels_last"
                    ),
                )
            sums = sums + outputs.text_embeds
        means = torch.nn.functional.normalize(sums, dim=-1)
        want.append(COLOURS[int((means @ outputs.image_embeds[0]).argmax())])
    assert colours == want
    assert list(classifier._texts_KD) == ["dog"]
    texts_KD = classifier._texts_KD["dog"]
    classifier(crops, "tv")
    assert np.abs(classifier._texts_KD["tv"] - texts_KD).max() > 1e-3


def test_the_whole_reward(directories, rng):
    reward = geneval.create(
        detector="transformers", path=directories[0], colour_path=directories[1], threshold="0.05"
    )
    asked = {
        "tag": "colors",
        "include": [{"class": "dog", "count": 1, "color": "red"}],
        "prompt": "a red dog",
    }
    reward.check("a red dog", asked)
    scores = reward(
        rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8), ["a red dog"] * 2, [asked] * 2
    )
    assert scores.total_B.shape == (2,) and set(scores.parts) == {"correct", "shaped"}
    assert np.isin(scores.total_B, [0, 0.5, 1]).all()


def test_missing_files_are_reported(directories, tmp_path):
    with pytest.raises(UserError, match="path='' must be a local directory"):
        geneval.create(detector="transformers")
    with pytest.raises(UserError, match="colour_path='/nowhere' must be a local directory"):
        geneval.create(detector="transformers", path=directories[0], colour_path="/nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"}))
    with pytest.raises(UserError, match="no id2label"):
        geneval.create(detector="transformers", path=str(tmp_path), colour_path=directories[1])
