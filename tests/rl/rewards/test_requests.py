"""Check that requests to a reward server are validated before anything is decoded."""

import json
import pickle

import numpy as np
import pytest

from blip3o_jax.rl.rewards import requests
from blip3o_jax.serving.refused import Refused
from tests.rl.rewards.in_process import body, png


def changed(**fields) -> bytes:
    return json.dumps({**body(png()), **fields}).encode()


@pytest.mark.parametrize(
    ("data", "status", "line"),
    [
        (b'{"prompts": [', 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b'{"prompts": NaN}', 400, "NaN is no JSON number"),
        (b"[" * 5000, 400, "the body is not JSON"),
        (b"[" + b"9" * 5000 + b"]", 400, "the body is not JSON"),
        (b"[" + b"[]," * 200_000 + b"[]]", 413, "more than 262144 values"),
        (b"[]", 422, "must be an object with prompts, metadata, images"),
        (changed(more=1), 422, "and nothing else"),
        (changed(prompts=[1]), 422, "prompts must be a list of texts"),
        (changed(prompts=["\ud800"]), 422, "prompts[0] holds half a surrogate pair"),
        (changed(metadata=["x"]), 422, "metadata must be a list of objects"),
        (changed(metadata=[{"x": 0}]).replace(b"0}", b"1e999}"), 400, "metadata[0] is not JSON"),
        (changed(prompts=["a", "b"]), 422, "2 prompts, 1 metadata and 1 images"),
        (json.dumps(body()).encode(), 422, "0 prompts"),
        (json.dumps(body(*[b"GIF"] * 1025)).encode(), 413, "more than 1024 images"),
        (changed(images=["%%%"]), 400, "images[0] is not base64"),
        (changed(images=["\u00e9"]), 400, "images[0] is not base64"),
        (json.dumps(body(png(), b"GIF89a" + bytes(40))).encode(), 400, "images[1] is not a PNG"),
        (json.dumps(body(png(size=(101, 100)))).encode(), 413, "more than 10000 pixels"),
        (
            json.dumps(body(*[png(size=(60, 60))] * 3)).encode(),
            413,
            "more than 10000 pixels altogether",
        ),
    ],
)
def test_what_is_refused(data, status, line):
    with pytest.raises(Refused) as refused:
        requests.parse_request(data, 10_000)
    assert (
        refused.value.status == status
        and line in refused.value.line
        and "\n" not in refused.value.line
    )


def test_what_is_taken():
    found = requests.parse_request(
        bytearray(changed(prompts=["\U0001f600"], metadata=[{"x": [1, "\udc00"]}])), 64
    )
    assert found.prompts == ["\U0001f600"] and json.loads(found.metadata[0]) == {"x": [1, "\udc00"]}
    assert [(image.height, image.width) for image in found.images] == [(8, 8)]


def test_both_outcomes_come_back_from_a_process():
    found = requests.parse_array(np.frombuffer(changed(), np.uint8), 64)
    there = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(there.images[0].file, found.images[0].file)
    refused = pickle.loads(pickle.dumps(Refused(503, "a\nline")))
    assert (refused.status, refused.line, refused.headers) == (503, "a line", {"Retry-After": "1"})
