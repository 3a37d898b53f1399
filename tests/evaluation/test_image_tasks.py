"""Check the suites of editing, understanding and reconstruction: an oracle's result, and the
baselines'."""

import json

import numpy as np
import pytest
from PIL import Image

from blip3o_jax import config
from blip3o_jax.data.shapes import edit_scorer, edits, questions, render
from blip3o_jax.evaluation import reconstruction, registry, runner
from blip3o_jax.pipeline import Generated

SIZE = 48


class Oracle:
    """Answer correctly, by the key that a model does not get."""

    def __init__(self):
        self.config = config.Config(
            model=config.ModelConfig(
                image_size=SIZE,
                dit=config.SanaConfig(in_channels=4, out_channels=4),
                vae=config.DcAeConfig(
                    latent_channels=4,
                    attention_head_dim=8,
                    encoder_block_types=("ResBlock", "ResBlock"),
                    decoder_block_types=("ResBlock", "ResBlock"),
                    encoder_block_out_channels=(8, 8),
                    decoder_block_out_channels=(8, 8),
                    encoder_layers_per_block=(1, 1),
                    decoder_layers_per_block=(1, 1),
                    encoder_qkv_multiscales=((), ()),
                    decoder_qkv_multiscales=((), ()),
                ),
            )
        )

    def generate_requests(self, requests, *, seed, progress, **settings):
        assert (progress, settings) == (True, {"steps": 7})
        if requests[0].task == "reconstruct":
            drawn = [request.images[0] for request in requests]
        else:
            drawn = [
                render(edits.sample_edit(seed, i, "test").after, SIZE) for i in range(len(requests))
            ]
        return Generated(
            [r.text for r in requests], np.stack(drawn), np.zeros((len(requests), 4), np.int32)
        )

    def ask(self, images, texts, *, max_new_tokens, seed, **settings):
        assert max_new_tokens == runner.MAX_ANSWER_TOKENS
        asked = [questions.sample_question(seed, i, "test") for i in range(len(texts))]
        assert [q.question for q in asked] == texts and all(
            (q_images[0] == render(q.scene, SIZE)).all()
            for q_images, q in zip(images, asked, strict=True)
        )
        return [q.answer.upper() for q in asked]


@pytest.mark.parametrize(
    ("suite", "baselines"),
    [
        ("shapes_edit", {"real_images": 1.0, "input_unchanged": 0.0}),
        ("shapes_qa", {"most_frequent_answer": None}),
        ("reconstruct", {"real_images": 1.0, "images_of_other_prompts": None}),
    ],
)
def test_who_does_as_asked_is_right(tmp_path, suite, baselines):
    count = 28
    result = runner.evaluate_pipeline(
        Oracle(), registry.find_suite(suite), num_prompts=count, seed=2, steps=7
    )
    scores = result.scores()
    assert scores["overall"] == 1.0 and set(scores["categories"].values()) == {1.0}
    assert scores["baselines"].keys() == baselines.keys()
    for name, value in baselines.items():
        found = scores["baselines"][name]["overall"]
        assert found == value if value is not None else found < 0.6
    measured = {
        "shapes_edit": {"psnr": 60},
        "reconstruct": {"psnr": 60, "ssim": pytest.approx(1)},
    }.get(suite, {})
    assert {name: scores.get(name) for name in ("psnr", "ssim") if name in scores} == measured
    runner.write(result, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert len(json.loads((tmp_path / "results.json").read_text())) == count
    picture = np.array(Image.open(tmp_path / "images" / "00003.png"))
    assert picture.shape == (SIZE, SIZE if suite == "shapes_qa" else 2 * SIZE, 3)


def test_similarity():
    """Compare with values by hand where there are: equal pictures, a constant shift, noise."""
    rng = np.random.default_rng(0)
    a = rng.integers(60, 190, (32, 32, 3), np.uint8)
    assert edit_scorer.psnr(a, a) == 60 and reconstruction.ssim(a, a) == pytest.approx(1)
    assert edit_scorer.psnr(a, a + np.uint8(20)) == pytest.approx(20 * np.log10(255 / 20))
    flat = np.full((32, 32, 3), 100, np.uint8)
    means = (2 * 100 * 120 + 6.5025) / (100**2 + 120**2 + 6.5025)
    assert reconstruction.ssim(flat, flat + np.uint8(20)) == pytest.approx(means, rel=1e-6)
    assert reconstruction.ssim(a, a[::-1]) < 0.2
