"""Which layers of the student and the teacher are compared."""

import pytest

from tinybert_jax.settings.layer_maps import make_layer_pairs


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, (3, 6, 9, 12)),
        ("uniform", 3, 6, (2, 4, 6)),
        ("top", 4, 12, (9, 10, 11, 12)),
        ("bottom", 4, 12, (1, 2, 3, 4)),
        ((1, 5, 12), 3, 12, (1, 5, 12)),
    ],
)
def test_layer_maps(kind, student, teacher, expected):
    pairs = tuple(enumerate(expected, start=1))
    assert make_layer_pairs(kind, student, teacher) == pairs


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("last", ((3, 6),)),
        ("skip", ((1, 2), (2, 4))),
        (((2, 1), (2, 4)), ((2, 1), (2, 4))),
    ],
)
def test_layer_maps_that_leave_layers_out(kind, expected):
    assert make_layer_pairs(kind, 3, 6) == expected


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "words"),
    [
        ("uniform", 5, 12, ["12", "5", "top"]),
        ("uniform", 13, 12, ["13", "12"]),
        ((1, 2), 3, 12, ["3 teacher layers", "[1, 2]"]),
        ((0, 1, 2), 3, 12, ["1 to 12", "[0, 1, 2]"]),
    ],
)
def test_layer_maps_that_do_not_fit_name_both(kind, student, teacher, words):
    with pytest.raises(ValueError) as caught:
        make_layer_pairs(kind, student, teacher)
    assert all(word in str(caught.value) for word in words)
