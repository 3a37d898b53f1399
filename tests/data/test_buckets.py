"""Images of several shapes: which record has which, batches of one shape each, and the same model
for all of them.
"""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

import blip3o_jax
from blip3o_jax import config, pipeline
from blip3o_jax.config import ConfigError, UserError
from blip3o_jax.data import images
from blip3o_jax.data.buckets import by_shape
from blip3o_jax.data.examples import ExampleBuilder
from blip3o_jax.data.loader import Loader
from blip3o_jax.data.record import BadRecord
from blip3o_jax.data.sources import open_mixture
from blip3o_jax.train import supervised
from blip3o_jax.train.metrics import read_rows
from tests import tiny
from tests.conftest import relative_error

WIDE, HIGH = (16, 24), (24, 16)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


def png(height, width, value=0, **options):
    buffer = io.BytesIO()
    pixels = np.full((height, width, 3), value, np.uint8)
    pixels[: height // 2, : width // 2] = 255 - value
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def write(directory, shapes):
    """Write captioned images of these shapes; every third is an edit that shows another."""
    directory.mkdir()
    lines = []
    for i, (height, width) in enumerate(shapes):
        (directory / f"{i}.png").write_bytes(png(height, width, 40 + i))
        line = {"image": f"{i}.png", "caption": f"a {('red', 'blue')[i % 2]} cat"}
        lines.append(
            line
            | (
                {"instruction": "red", "input_image": f"{(i + 5) % len(shapes)}.png"}
                if i % 3 == 2
                else {}
            )
        )
    (directory / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return directory


# Twelve of 3:2 and twelve of 2:3, not in turns; some are larger, some not quite of the shape.
SHAPES = [(20, 30), (20, 30), (30, 20), (40, 62), (33, 20), (30, 20)] * 4
EDITING = {"reference_slots": 1, "latents": True, "latent_concat": True}


def run_config(folder, **changes):
    model = {"buckets": (WIDE, HIGH), "editing": EDITING}
    return tiny.run_config(folder, model=model, steps=4, **changes)


@pytest.mark.parametrize(
    ("height", "width", "want"),
    [(20, 30, WIDE), (30, 20, HIGH), (100, 110, WIDE), (9, 8, HIGH), (1, 99, WIDE)],
)
def test_the_nearest_shape(height, width, want):
    model = dataclasses.replace(tiny.model(), buckets=(WIDE, HIGH))
    assert model.nearest_size(height, width) == want
    assert tiny.model().nearest_size(height, width) == (16, 16)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        (((16, 22),), "both multiples of 4"),
        (((16,),), "must hold 2 values"),
        ((WIDE, WIDE), "twice"),
    ],
)
def test_sizes_that_cannot_be(buckets, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(tiny.model(), buckets=buckets)


def test_views_are_cut_to_the_shape_and_never_stretched():
    """Exempt the tokenizer's view, which is the same part squashed to a square."""
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 20:80] = np.arange(60)[None, :, None] * 4  # the part that a ratio of 3:2 keeps
    pixels, seen = images.views(image, (16, 24), 16, "shared")
    assert pixels.shape == (16, 24, 3) and seen.shape == (16, 16, 3)
    assert (
        pixels[:, 0].max() < 12
        and pixels[:, -1].min() > 226
        and seen[:, 0].max() < 14
        and seen[:, -1].min() > 224
    )
    high = images.crop_and_resize(image.transpose(1, 0, 2), (24, 16))
    np.testing.assert_allclose(high.transpose(1, 0, 2).astype(int), pixels.astype(int), atol=1)


def test_the_shape_is_that_of_the_upright_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(20, 30, exif=exif)
    assert images.shape_of(data) == images.decode(data).shape[:2] == (30, 20) and images.shape_of(
        png(20, 30)
    ) == (20, 30)
    exif[0x0112] = 9  # which there is not
    data = png(20, 30, exif=exif)
    assert images.shape_of(data) == images.decode(data).shape[:2] == (20, 30)
    for broken in (b"", b"no image"):
        with pytest.raises(BadRecord, match=r"the image (has zero bytes|cannot be decoded)"):
            images.shape_of(broken)


def test_batches_have_one_shape_each_and_every_record_its_turn(tmp_path):
    """Sample shapes by their fractions of the records; the same on one host and on two, and
    after resuming.
    """
    cfg = run_config(write(tmp_path / "d", SHAPES), data={"batch_size": 4})
    groups = by_shape(open_mixture(cfg.data), cfg.model)
    assert [
        [(source.shape, len(source), weight) for source, weight in group] for group in groups
    ] == [
        [(WIDE, 12, 0.5)],
        [(HIGH, 12, 0.5)],
    ]
    sources = [source for group in groups for source in group]

    def loader(rows=None):
        transform = lambda record: {
            "key": np.array(record.key),
            "size": np.array(images.decode(record.image).shape[:2]),
        }
        return Loader(sources, transform, dataclasses.replace(cfg.data, batch_size=4), 0, rows=rows)

    whole, halves = loader(), [loader([0, 1]), loader([2, 3])]
    batches = [next(whole) for _ in range(12)]
    for batch in batches[:6]:
        got = [next(half)["key"].tolist() for half in halves]
        assert batch["key"].tolist() == got[0] + got[1]
        assert len({height < width for height, width in batch["size"].tolist()}) == 1
    assert (
        len({batch["size"][0].tolist()[0] < batch["size"][0].tolist()[1] for batch in batches[:2]})
        == 2
    )
    seen = [key for batch in batches[:6] for key in batch["key"].tolist()]
    assert sorted(seen) == sorted(f"{i}.png" for i in range(24)), "six batches are an epoch of both"
    resumed = loader()
    resumed.restore(halves[0].state())
    assert next(resumed)["key"].tolist() == batches[6]["key"].tolist()
    other = Loader(sources, lambda record: {}, dataclasses.replace(cfg.data, batch_size=8), 0)
    with pytest.raises(UserError, match=r"batch_size.*4.*8"):
        other.restore(whole.state())
    for loaded in (whole, *halves, resumed):
        loaded.close()


def test_which_record_has_which_shape_is_looked_at_once(tmp_path, monkeypatch):
    cfg = run_config(write(tmp_path / "d", SHAPES))
    first = by_shape(open_mixture(cfg.data), cfg.model)
    monkeypatch.setattr(images, "shape_of", lambda *args: pytest.fail("a header was read again"))
    again = by_shape(open_mixture(cfg.data), cfg.model)
    assert [[len(s) for s, _ in group] for group in again] == [
        [len(s) for s, _ in group] for group in first
    ]


def test_an_image_of_zero_bytes_is_of_the_first_shape(tmp_path):
    """Leave the error to the loader."""
    folder = write(tmp_path / "d", SHAPES)
    (folder / "0.png").write_bytes(b"")
    (folder / "2.png").write_bytes(b"")
    cfg = run_config(folder)
    (wide,), (high,) = by_shape(open_mixture(cfg.data), cfg.model)
    assert (len(wide[0]), len(high[0])) == (13, 11)


def test_what_is_cached_of_a_shape_is_of_the_same_records(tmp_path):
    """Check that a further size takes some of the records of another: the rest is not what it
    was.
    """
    cfg = run_config(write(tmp_path / "d", SHAPES))
    names = []
    for buckets in ((WIDE, HIGH), (HIGH, WIDE), (WIDE, HIGH, (16, 16)), (WIDE, HIGH, (36, 56))):
        groups = by_shape(open_mixture(cfg.data), dataclasses.replace(cfg.model, buckets=buckets))
        ((source, _),) = next(group for group in groups if group[0][0].shape == WIDE)
        names.append((source.fingerprint, len(source)))
    assert names[0] == names[1] == names[2], "the same records, whatever other sizes there are"
    assert names[3][1] < names[0][1] and names[3][0] != names[0][0]


def test_both_shapes_train_cache_edit_and_decode(tmp_path):
    """Check that a run from the encoders' cache has the losses of one that encodes; what is edited
    has the shape of what is shown.
    """
    folder, losses = write(tmp_path / "d", SHAPES), []
    for cache_dir in ("", str(tmp_path / "cache")):
        workdir = tmp_path / f"run{len(cache_dir)}"
        supervised.train(run_config(folder, data={"cache_dir": cache_dir}), workdir)
        losses.append(
            [(row["train/ce"], row["train/flow"]) for row in read_rows(workdir / "metrics.jsonl")]
        )
    assert np.isfinite(losses[0]).all() and relative_error(losses[1], losses[0]) < 1e-5

    model = blip3o_jax.load(workdir)
    wide, high = (images.decode(png(*shape, 90)) for shape in ((40, 60), (33, 20)))
    settings = {"seed": 1, "steps": 2, "batch_size": 8}
    drawn = model.edit([wide, high, wide], ["red", "red", "blue"], **settings)
    assert [image.shape[:2] for image in drawn.images] == [WIDE, HIGH, WIDE]
    alone = model.edit([high], ["red"], first_index=1, **settings)
    assert np.abs(alone.images[0].astype(int) - drawn.images[1]).max() <= 1
    assert model.generate(["a red cat"], **settings).images.shape[1:3] == WIDE
    asked = pipeline.Request("edit", "red", (wide,), size=(32, 8))
    assert model.generate_requests([asked], **settings).images.shape[1:3] == (32, 8), (
        "any multiple of the autoencoder's factor"
    )
    with pytest.raises(ConfigError, match=r"size=\(30, 8\) must be"):
        model.generate_requests([dataclasses.replace(asked, size=(30, 8))], **settings)
    assert config.from_dict(config.to_dict(model.config)) == model.config


def test_the_views_of_one_row_have_one_shape(tmp_path):
    cfg = run_config(write(tmp_path / "d", SHAPES))
    ((source, _),) = open_mixture(cfg.data)
    builder = ExampleBuilder(("pixels", "tokenizer_pixels"), cfg.model, cfg.data)
    record = next(source[i] for i in range(24) if source[i].references)
    shapes = {pixels.shape[:2] for _, (pixels, _) in builder.images_of(record)}
    assert shapes == {cfg.model.nearest_size(*images.shape_of(record.image))}
