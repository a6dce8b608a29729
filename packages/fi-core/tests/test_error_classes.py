"""Errors say what they must and reach another process as they are."""

import copy
import pickle

import fi_core as fi
import pytest
from fi_core.errors import FiError

ERRORS = [
    fi.FiError("plain"),
    fi.ArgumentError("q", "[T, 4, 64]", (3, 4, 65)),
    fi.CapacityError("batch.kv_lens", "at most max_batch=4", 5),
    fi.UnsupportedError("attention(...)", [("a.b", ["dtype: no", "head_dim: no"])]),
    fi.UnsupportedError("attention(...)", []),
    fi.UnknownBackendError("unknown backend 'x'"),
    fi.IndexCheckError("positions[1]: 9"),
    fi.LayoutError("q", "a contiguous last dim", "strides (4, 2)"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda item: type(item).__name__)
def test_errors_survive_pickling_and_copying(error: FiError) -> None:
    error.add_note("in step 3")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert (str(again), vars(again)) == (str(error), vars(error))


def test_argument_errors_are_value_errors_with_parts() -> None:
    with pytest.raises(ValueError, match=r"^q: expected 3 dims, got 2$") as caught:
        raise fi.ArgumentError("q", "3 dims", 2)
    assert isinstance(caught.value, fi.FiError)
    assert (caught.value.argument, caught.value.expected, caught.value.actual) == ("q", "3 dims", "2")


def test_layout_errors_are_of_both_kinds() -> None:
    with pytest.raises(fi.UnsupportedError, match=r"^q: expected a contiguous last dim, got strides") as caught:
        raise fi.LayoutError("q", "a contiguous last dim", "strides (4, 2)")
    assert isinstance(caught.value, fi.ArgumentError)
    assert (caught.value.argument, caught.value.rejections) == ("q", ())


def test_unsupported_errors_say_why() -> None:
    assert str(ERRORS[3]).splitlines() == ["no kernel supports attention(...)", "  a.b: dtype: no; head_dim: no"]
    assert "no backend registered a kernel" in str(ERRORS[4])
