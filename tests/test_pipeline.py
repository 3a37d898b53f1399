import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import blip3o_jax
from blip3o_jax import checksums, sampling_programs
from blip3o_jax import pipeline as pipelines
from blip3o_jax.config import MeshConfig, UserError
from tests import tiny
from tests.conftest import relative_error

# Of three lengths; the last one makes the batch's rows longer than a prompt alone would.
PROMPTS = [
    "a red cat",
    "a small blue tall tree",
    "a big green boat",
    "pink",
    "a small red cat and a big blue boat " * 2,
]
SETTINGS = {
    "temperature": 1.0,
    "top_k": 20,
    "top_p": 0.9,
    "steps": 3,
    "guidance": 1.5,
    "token_guidance": 1.5,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return the workdir of a joint run, moved away from where it was written, its data out of
    reach."""
    root = tmp_path_factory.mktemp("pipeline")
    tiny.write_checkpoint(root / "written")
    shutil.move(root / "written", root / "moved")
    config = root / "moved" / "checkpoints" / "config.json"
    values = checksums.read_json(config)
    checksums.write_json(
        config, values | {"data": values["data"] | {"path": str(root / "deleted")}}
    )
    return root / "moved"


@pytest.fixture(scope="module")
def on_one(checkpoint):
    """Return the pipeline on one device."""
    single = tiny.strategy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.Strategy, "of", lambda cfg: single)
        return blip3o_jax.load(checkpoint)


@pytest.fixture(scope="module")
def alone(on_one):
    """Return codes and images of every prompt, each sampled by itself."""
    drawn = [
        on_one.generate([p], seed=3, first_index=i, batch_size=1, **SETTINGS)
        for i, p in enumerate(PROMPTS)
    ]
    return np.concatenate([d.codes for d in drawn]), np.concatenate([d.images for d in drawn])


def check_same(drawn, codes_BN, images_BHWC):
    np.testing.assert_array_equal(drawn.codes, codes_BN)
    # Sums are in another order at another batch size: a value at the edge of two levels may round
    # to either.
    assert np.abs(drawn.images.astype(int) - images_BHWC.astype(int)).max() <= 1


def test_images_are_those_of_the_settings(alone):
    codes_BN, images_BHWC = alone
    assert images_BHWC.shape == (5, 16, 16, 3) and images_BHWC.dtype == np.uint8
    assert codes_BN.shape == (5, 4) and codes_BN.min() >= 0 and codes_BN.max() < 32
    assert len({tuple(row) for row in codes_BN.tolist()}) == 5, "the prompts say nothing"
    assert len({image.tobytes() for image in images_BHWC}) == 5


def test_a_batch_of_different_lengths_gives_what_each_prompt_gives_alone(on_one, alone):
    """Use batches of 2: rows are padded to the longest prompt of all, and the last batch has a
    spare row."""
    check_same(on_one.generate(PROMPTS, seed=3, batch_size=2, **SETTINGS), *alone)


def test_a_prompt_does_not_depend_on_the_others(on_one, alone):
    codes_BN, images_BHWC = alone
    drawn = on_one.generate([PROMPTS[4], PROMPTS[1], PROMPTS[0]], seed=3, batch_size=2, **SETTINGS)
    assert (drawn.codes[1] == codes_BN[1]).all() and (drawn.codes[0] != codes_BN[4]).any()
    assert np.abs(drawn.images[1].astype(int) - images_BHWC[1]).max() <= 1


def test_no_more_rows_are_drawn_than_there_are_prompts(on_one, alone):
    check_same(
        on_one.generate(PROMPTS[:2], seed=3, batch_size=2**24, **SETTINGS),
        *(array[:2] for array in alone),
    )
    assert [pipelines._batch_size(n, 48, 8) for n in (1, 8, 9, 17, 33, 48, 99)] == [
        8,
        8,
        16,
        32,
        48,
        48,
        48,
    ]


def test_seed_and_index_choose_the_image(on_one, alone):
    codes_BN, images_BHWC = alone
    other_seed = on_one.generate(PROMPTS[:1], seed=4, batch_size=1, **SETTINGS)
    other_index = on_one.generate(PROMPTS[:1], seed=3, first_index=1, batch_size=1, **SETTINGS)
    for other in (other_seed, other_index):
        assert (other.codes[0] != codes_BN[0]).any() and (other.images[0] != images_BHWC[0]).any()


def unrounded(checkpoint, mesh=None):
    """Return the results of a batch of all prompts, the images as float32; on one device without
    a mesh."""
    single = tiny.strategy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_programs, "to_uint8", lambda x: x)
        if mesh is None:
            patch.setattr(pipelines.Strategy, "of", lambda cfg: single)
        return blip3o_jax.load(checkpoint, mesh).generate(PROMPTS, seed=3, batch_size=8, **SETTINGS)


@pytest.fixture(scope="module")
def unrounded_on_one(checkpoint):
    return unrounded(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("fsdp_tp", "hybrid_fsdp_sp") else pytest.mark.slow)
        for name in tiny.MESHES
    ],
)
def test_eight_devices_give_the_same(checkpoint, unrounded_on_one, alone, name):
    """Compare float32 sums in another order, through four tokens, three steps of the DiT and the
    decoder: 1e-5 of the images."""
    mesh = {"data": 1, "fsdp": 1} | tiny.MESHES[name]
    drawn = unrounded(checkpoint, MeshConfig(strategy=mesh.pop("name"), **mesh))
    np.testing.assert_array_equal(drawn.codes, unrounded_on_one.codes)
    assert drawn.images.dtype == np.float32
    assert relative_error(drawn.images, unrounded_on_one.images) < 1e-5
    check_same(dataclasses.replace(drawn, images=np.round(drawn.images * 255)), *alone)


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([], {}, "no prompt given"),
        (["a cat", "cat " * 90], {}, "prompt 'cat cat cat "),
        (
            ["a cat"],
            {"stepps": 3},
            "unknown sampling setting stepps: use batch_size, guidance, reference_guidance, steps",
        ),
        (["a cat"], {"top_p": 2.0}, "sampling.top_p=2.0"),
        (["a cat"], {"top_p": 0.0}, "sampling.top_p=0.0"),
        (["a cat"], {"temperature": -0.5}, "sampling.temperature=-0.5"),
        (["a cat"], {"temperature": float("nan")}, "sampling.temperature=nan"),
        (["a cat"], {"top_k": -1}, "sampling.top_k=-1"),
        (["a cat"], {"steps": 0}, "sampling.steps=0"),
        (["a cat"], {"batch_size": 0}, "sampling.batch_size=0"),
        (["a cat"], {"guidance": float("inf")}, "sampling.guidance=inf"),
        (["a cat"], {"seed": -1}, "seed=-1"),
        (["a cat"], {"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(on_one, prompts, settings, words):
    with pytest.raises(UserError) as error:
        on_one.generate(prompts, **settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_files_of_a_run(checkpoint, on_one, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pipelines, "load", lambda path: on_one if path == checkpoint else None)
    overrides = SETTINGS | {"batch_size": 2}
    paths = pipelines.generate_to_directory(
        checkpoint, [("t2i", p, ()) for p in PROMPTS], tmp_path / "out", seed=3, overrides=overrides
    )
    assert [p.name for p in paths] == [f"{i:05d}.png" for i in range(5)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *(p.name for p in paths),
        "grid.png",
        "prompts.jsonl",
    ]
    drawn = on_one.generate(PROMPTS, seed=3, **overrides)
    for path, image_HWC in zip(paths, drawn.images, strict=True):
        np.testing.assert_array_equal(np.array(Image.open(path)), image_HWC)
    lines = [
        json.loads(line)
        for line in (tmp_path / "out" / "prompts.jsonl").read_text("utf-8").splitlines()
    ]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert "5/5 images" in capsys.readouterr().err

    with pytest.raises(
        UserError, match="tokens long; with 4 image tokens that is more than the model's 72"
    ):
        pipelines.generate_to_directory(
            checkpoint,
            [("t2i", p, ()) for p in ("a cat", "cat " * 90)],
            tmp_path / "none",
            seed=0,
            overrides={},
        )
    assert not (tmp_path / "none").exists()


def test_the_checkpoint_is_found_by_every_name_it_has(checkpoint):
    for path in (checkpoint, checkpoint / "checkpoints", checkpoint / "checkpoints" / "6"):
        assert pipelines.checkpoints.find(path) == (checkpoint / "checkpoints", 6)


def test_what_is_no_checkpoint(tmp_path, checkpoint):
    def message(path):
        with pytest.raises(UserError) as error:
            blip3o_jax.load(path)
        assert str(path) in str(error.value)
        return str(error.value)

    assert "does not exist" in message(tmp_path / "nowhere")
    assert "is not a checkpoint" in message(tmp_path)
    # Somebody else's model directory.
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert "is not a checkpoint" in message(tmp_path)
    # A run that was ended before its first checkpoint.
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint / "checkpoints" / "config.json", tmp_path / "run" / "checkpoints")
    assert "finished steps" in message(tmp_path / "run")
    # A file.
    assert "is not a checkpoint" in message(tmp_path / "config.json")


def test_another_stages_checkpoint_cannot_be_sampled_from(tmp_path, checkpoint):
    config = checksums.read_json(checkpoint / "checkpoints" / "config.json")
    (tmp_path / "3" / "state").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"stage": "autoencoder"}))
    with pytest.raises(
        UserError,
        match="was written by stage 'autoencoder'; sampling needs a checkpoint of stage 'joint'",
    ):
        blip3o_jax.load(tmp_path)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """Return the pipeline of a model with two reference slots, on one device."""
    root = tmp_path_factory.mktemp("seeing")
    tiny.write_checkpoint(
        root, model={"editing": {"reference_slots": 2, "latents": True, "latent_concat": True}}
    )
    single = tiny.strategy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.Strategy, "of", lambda cfg: single)
        return blip3o_jax.load(root)


def photos():
    return list(np.random.default_rng(5).integers(0, 256, (3, 20, 24, 3), np.uint8))


def test_tasks_mix_and_each_is_what_it_is_alone(seeing):
    a, b, c = photos()
    requests = [
        pipelines.Request("edit", "red", (a,)),
        pipelines.Request("t2i", "a red cat"),
        pipelines.Request("edit", "both", (a, b)),
        pipelines.Request("reconstruct", "", (c,)),
        pipelines.Request("edit", "red", (b,)),
    ]
    settings = SETTINGS | {"token_guidance": 1.0, "reference_guidance": 1.2}
    together = seeing.generate_requests(requests, seed=3, batch_size=2, **settings)
    assert len({image.tobytes() for image in together.images}) == 5
    for i, request in enumerate(requests):
        alone = seeing.generate_requests([request], seed=3, first_index=i, batch_size=1, **settings)
        check_same(alone, together.codes[i : i + 1], together.images[i : i + 1])
    edited = seeing.edit([a, [a, b]], ["red", "both"], seed=3, **settings)
    check_same(
        seeing.generate_requests([requests[0]], seed=3, batch_size=1, **settings),
        edited.codes[:1],
        edited.images[:1],
    )
    again = seeing.reconstruct([c], seed=3, first_index=3, **settings)
    check_same(again, together.codes[3:4], together.images[3:4])
    assert edited.prompts == ["red", "both"]


def test_answers_are_the_likeliest_words_till_the_end_of_the_turn(seeing):
    """Compare with the likeliest token after a pass over the whole row, token by token, for three
    questions of one batch."""
    shown, questions, max_new_tokens = photos(), ["a red", "small", "what is it"], 6
    answers = seeing.ask(shown, questions, max_new_tokens=max_new_tokens, batch_size=4)
    vocabulary = seeing.vocabulary

    @jax.jit
    def next_token(params, tokens_BL, length):
        model = seeing._model(params)
        row_BL = jnp.arange(tokens_BL.shape[1])[None]
        hidden_BLD = model.hidden(tokens_BL, row_BL, (row_BL < length).astype(jnp.int32))
        return jnp.argmax(model.ar.logits(hidden_BLD)[0, length - 1, : vocabulary.image_start])

    for image, question, answer in zip(shown, questions, answers, strict=True):
        request = pipelines.Request("understand", question, (image,))
        prompt = seeing._prompt(request, max_new_tokens)
        views = seeing._views(request, prompt, (16, 16))
        codes_N = seeing.codes(views["reference_tokenizer_pixels"][:1])[0]
        row = np.zeros((1, 72), np.int32)
        row[0, : len(prompt.ids)] = prompt.ids
        at = prompt.references[0] + 1
        row[0, at : at + 4] = vocabulary.image_ids_from_codes(codes_N)
        ids = []
        while len(ids) < max_new_tokens:
            token = int(next_token(seeing._params, row, len(prompt.ids) + len(ids)))
            if token == vocabulary.end_of_turn:
                break
            row[0, len(prompt.ids) + len(ids)] = token
            ids.append(token)
        assert answer == vocabulary.decode(ids).strip()
    assert len(set(answers)) > 1, "the images and questions say nothing"
    drawn = [
        seeing.ask(
            shown[:1], questions[:1], max_new_tokens=max_new_tokens, temperature=2.0, seed=seed
        )[0]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_answer_ends_where_its_row_does(seeing, monkeypatch):
    """Use a model that never ends its turn."""
    endless = lambda params, tokens_BL, max_new_tokens, **_: (
        np.zeros((len(tokens_BL), max_new_tokens), int),
        np.full(len(tokens_BL), max_new_tokens),
    )
    monkeypatch.setattr(seeing, "_sample_text", endless)
    monkeypatch.setattr(type(seeing.vocabulary), "decode", lambda self, ids: str(len(ids)))
    shown, questions = photos()[:2], ["what is it", "what"]
    lengths = [
        len(seeing._prompt(pipelines.Request("understand", q, (shown[0],)), 1).ids)
        for q in questions
    ]
    assert lengths[0] > lengths[1] > 72 - 64
    assert seeing.ask(shown, questions) == [str(72 - length) for length in lengths]
    assert seeing.ask(shown, questions, max_new_tokens=3) == ["3", "3"]


def test_what_cannot_be_shown_is_one_line(seeing, on_one):
    photo = photos()[0]
    for model, call, message in [
        (
            seeing,
            lambda m: m.edit([[photo] * 3], ["x"]),
            "images given: 3, but the model takes at most 2 in a row: leave",
        ),
        (
            on_one,
            lambda m: m.edit([photo], ["x"]),
            "images given: 1, but the model was not trained with any: take a",
        ),
        (seeing, lambda m: m.edit([photo], [" "]), "the instruction is empty"),
        (seeing, lambda m: m.ask([photo], [""]), "the question is empty"),
        (
            seeing,
            lambda m: m.ask([photo], ["x " * 80]),
            "with 1 token of an answer that is more than the model's 72",
        ),
        (seeing, lambda m: m.edit([()], ["x"]), "task edit needs an image"),
        (
            seeing,
            lambda m: m.edit(["photo.png"], ["x"]),
            "must be a uint8 array [H, W, 3], not str: ",
        ),
        (
            seeing,
            lambda m: m.ask([photo[..., 0]], ["x"]),
            "must be a uint8 array [H, W, 3], not uint8 [20, 24]: ",
        ),
        (
            seeing,
            lambda m: m.reconstruct([photo / 255]),
            "must be a uint8 array [H, W, 3], not float64 [20, 24, 3]: ",
        ),
        (
            seeing,
            lambda m: m.generate_requests([pipelines.Request("t2i", "x", (photo,))]),
            "task t2i shows no image",
        ),
        (
            seeing,
            lambda m: m.generate_requests([pipelines.Request("understand", "x", (photo,))]),
            "text as its output: use ask",
        ),
    ]:
        with pytest.raises(UserError) as error:
            call(model)
        assert message in str(error.value) and "\n" not in str(error.value)
