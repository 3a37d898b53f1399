import json
import types

import numpy as np
import pytest
from PIL import Image

from blip3o_jax import pipeline as pipelines
from blip3o_jax.config import UserError
from blip3o_jax.evaluation import registry, runner, shapes

COUNT = 14


class Oracle:
    """Replace a pipeline: render the asked scenes, except for every fifth prompt, whose image is
    white."""

    config = types.SimpleNamespace(model=types.SimpleNamespace(image_size=64))

    def __init__(self):
        self.calls = []

    def generate_requests(self, requests, **keywords):
        self.calls.append((requests, keywords))
        images_BHWC = shapes.real_images(len(requests), 64, keywords["seed"])
        images_BHWC[::5] = 255
        return pipelines.Generated(
            [r.text for r in requests], images_BHWC, np.zeros((len(requests), 4), np.int32)
        )


def test_evaluation_judges_what_was_asked():
    oracle = Oracle()
    evaluation = runner.evaluate_pipeline(
        oracle, num_prompts=COUNT, seed=2, steps=7, batch_size=None
    )
    ((requests, keywords),) = oracle.calls
    assert requests == [
        pipelines.Request("t2i", p["caption"], size=(64, 64)) for p in shapes.prompts(COUNT, 2)
    ]
    assert keywords == {"seed": 2, "progress": True, "steps": 7, "batch_size": None}
    assert evaluation.result.correct == [i % 5 != 0 for i in range(COUNT)]
    assert (
        evaluation.baselines["real_images"].overall == 1.0
        and evaluation.baselines["random_images"].overall < 0.3
    )


def test_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        pipelines, "load", lambda checkpoint: Oracle() if checkpoint == "c" else None
    )
    runner.evaluate("c", "shapes", tmp_path / "out", num_prompts=COUNT, seed=0, batch_size=3)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(scores) == {"overall", "categories", "prompts", "baselines"}
    assert scores["prompts"] == COUNT and len(scores["categories"]) == 7
    assert scores["overall"] == pytest.approx(np.mean(list(scores["categories"].values())))
    assert set(scores["baselines"]) == {"real_images", "random_images"}
    assert scores["baselines"]["real_images"] == {
        "overall": 1.0,
        "categories": dict.fromkeys(scores["categories"], 1.0),
    }

    outcomes = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [v["correct"] for v in outcomes] == [i % 5 != 0 for i in range(COUNT)]
    assert set(outcomes[0]) == {"caption", "category", "correct", "reason"}
    image = np.array(Image.open(tmp_path / "out" / "images" / "00001.png"))
    np.testing.assert_array_equal(image, shapes.real_images(2, 64)[1])
    assert (tmp_path / "out" / "images" / "grid.png").exists()
    assert f"shapes: {scores['overall']:.3f} of {COUNT} held-out prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suite", "prompts_file", "message"),
    [
        (
            "gen_eval",
            None,
            "suite='gen_eval' is not one of shapes, shapes_edit, shapes_qa, reconstruct, ocr, "
            "geneval",
        ),
        (
            "geneval,detector=shapes",
            None,
            "suite geneval,detector=shapes scores the prompts of a file: name one",
        ),
        ("ocr,scoring", "prompts.txt", "'scoring' is no option: write NAME,OPTION=VALUE"),
        (
            "ocr,weight=0.5",
            "prompts.txt",
            "suite ocr,weight=0.5 is one reward and no sum: leave out weight and clip",
        ),
    ],
)
def test_an_unknown_suite_is_refused_before_anything_is_loaded(
    tmp_path, suite, prompts_file, message
):
    with pytest.raises(UserError, match=message):
        runner.evaluate(
            tmp_path / "nowhere",
            suite,
            tmp_path / "out",
            num_prompts=1,
            seed=0,
            prompts_file=prompts_file,
        )
    assert not (tmp_path / "out").exists()


def test_shapes_has_one_image_a_prompt_and_a_number_of_prompts_of_its_own():
    with pytest.raises(UserError, match="suite shapes samples one image a prompt, not 4"):
        registry.find_suite("shapes", None, 4)
    assert len(shapes.prompts(None)) == shapes.COUNT
