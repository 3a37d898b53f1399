"""Excerpts of programs that XLA's TPU compiler made for v5p, as it prints them."""

import pytest

from blip3o_jax.bench import hlo


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("{}", ((0, 1, 2, 3),)),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", ((0, 2), (1, 3))),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ],
)
def test_replica_groups(text, want):
    assert hlo.replica_groups(text, 4) == want


def test_an_unknown_form_of_groups_is_not_guessed():
    with pytest.raises(ValueError, match="no form"):
        hlo.replica_groups("mesh['a'=2] {'b'}", 4)


def test_pairs():
    assert hlo.device_pairs("{{0,1},{1,2}}") == ((0, 1), (1, 2))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("bf16[16,64]{1,0:T(8,128)(2,1)S(1)}", hlo.Shape("bf16", (16, 64), 1)),
        ("f32[]", hlo.Shape("f32", ())),
        ("s4[3]{0}", hlo.Shape("s4", (3,))),
        (
            "(f32[2]{0}, /*index=1*/(u32[]{:S(2)}, pred[8]))",
            (hlo.Shape("f32", (2,)), (hlo.Shape("u32", (), 2), hlo.Shape("pred", (8,)))),
        ),
        ("()", ()),
    ],
)
def test_shapes(text, want):
    assert hlo._shape(text + " add(", 0) == (want, len(text))


@pytest.mark.parametrize(("dtype", "size"), [("bf16", 6), ("f32", 12), ("pred", 3), ("f8e4m3fn", 3), ("s4", 2), ("c64", 24)])
def test_bytes(dtype, size):
    assert hlo.Shape(dtype, (3,)).bytes == size


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty\n")
