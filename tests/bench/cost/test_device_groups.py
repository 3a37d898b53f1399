"""Parse the devices of collectives in all forms in which XLA prints them."""

import pytest

from blip3o_jax.bench.cost.device_groups import device_pairs, replica_groups


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
        (
            "mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}",
            ((0, 4), (1, 5), (2, 6), (3, 7)),
        ),
    ],
)
def test_replica_groups(text, want):
    assert replica_groups(text, 4) == want


def test_an_unknown_form_of_groups_is_not_guessed():
    with pytest.raises(ValueError, match="no form"):
        replica_groups("mesh['a'=2] {'b'}", 4)


def test_pairs():
    assert device_pairs("{{0,1},{1,2}}") == ((0, 1), (1, 2))
