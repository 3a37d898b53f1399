"""Equal captions never stand on both sides of the split."""

import dataclasses

import pytest

from blip3o_jax.config import DataConfig, SourceConfig, UserError
from blip3o_jax.data import sources as sources_lib
from blip3o_jax.data.held_out import caption_hash, divide, is_held_out
from tests import tiny

CAPTIONS = tuple(f"a cat number {n // 2}" for n in range(120))  # each twice


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("held") / "images", CAPTIONS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


def captions(source):
    return [source[i].caption for i in range(len(source))]


def test_a_split_by_caption_covers_all_records_once(folder, monkeypatch):
    source = sources_lib.open_source(SourceConfig(str(folder)))
    train, held_out = divide(source, 0.2)
    assert sorted(captions(train) + captions(held_out)) == sorted(CAPTIONS)
    assert not set(captions(train)) & set(captions(held_out))
    assert 8 <= len(held_out) <= 40 and len(held_out) % 2 == 0
    assert len({source.fingerprint, train.fingerprint, held_out.fingerprint}) == 3
    monkeypatch.setattr(type(source), "__getitem__", None)  # the second time nothing is read
    assert len(divide(source, 0.2)[1]) == len(held_out)


def test_a_larger_fraction_holds_out_the_same_captions_and_more():
    small, large = ({c for c in CAPTIONS if is_held_out(c, share)} for share in (0.1, 0.3))
    assert small < large


def test_case_and_space_do_not_make_another_caption():
    assert caption_hash("A red  Cat\n") == caption_hash("a red cat") != caption_hash("a red hat")


def test_a_reconstruction_source_has_the_images_of_its_side(folder):
    """Split by the captions that were there before they were dropped."""
    data = DataConfig(
        sources=(SourceConfig(str(folder)), SourceConfig(str(folder), task="reconstruct")),
        held_out=0.2,
    )
    (plain, _), (reconstructed, _) = sources_lib.open_held_out(data)
    assert [plain[i].image for i in range(len(plain))] == [
        reconstructed[i].image for i in range(len(reconstructed))
    ]
    assert len(plain) + len(sources_lib.open_mixture(data)[0][0]) == len(CAPTIONS)


def test_nothing_held_out_is_an_error_that_says_so(folder):
    data = DataConfig(path=str(folder), held_out=1e-9)
    with pytest.raises(UserError, match=r"raise data\.held_out"):
        sources_lib.open_held_out(data)
    assert sources_lib.open_held_out(dataclasses.replace(data, held_out=0.0)) == []


def test_nothing_left_to_train_on_is_an_error_that_says_so(tmp_path):
    folder = tiny.write_data(tmp_path / "alike", ("a cat",) * 3)
    assert is_held_out("a cat", 0.5)
    with pytest.raises(UserError, match=rf"held_out=0\.5 holds out all records of {folder}"):
        sources_lib.open_mixture(DataConfig(path=str(folder), held_out=0.5))
