"""What is accepted as JSON, and what is refused, and how."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai import payload
from sutazai.errors import InvalidInput, MalformedJSON

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(*payload.INTEGER_RANGE)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc"), inner),
    max_leaves=20,
)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"  \n",
        b"\xef\xbb\xbf{}",
        b'{"a": 1',
        b'{"a": NaN}',
        b"Infinity",
        b"1e999",
        b'"\\ud800"',
        b'"\xed\xa0\x80"',
        b"[" * 101 + b"]" * 101,
        b"[" * 100_000 + b"]" * 100_000,
        b"nul",
    ],
    ids=lambda raw: raw[:12].decode(errors="replace"),
)
def test_malformed(raw: bytes) -> None:
    with pytest.raises(MalformedJSON):
        payload.loads(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b'"\\u0000"',
        b'{"a\\u0000": 1}',
        b"18446744073709551616",
        b"-9223372036854775809",
        b"9" * 5000,
    ],
    ids=["nul", "nul key", "2**64", "-2**63-1", "5000 digits"],
)
def test_refused(raw: bytes) -> None:
    with pytest.raises(InvalidInput):
        payload.loads(raw)


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"18446744073709551615", 2**64 - 1),
        (b"-9223372036854775808", -(2**63)),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b"[" * 100 + b"]" * 100, None),
        (b'"\\\\u0000"', "\\u0000"),
        (b'"12345678901234567890123"', "12345678901234567890123"),
        (b"1.2345678901234567890123", 1.2345678901234567),
    ],
)
def test_accepted(raw: bytes, value: object) -> None:
    loaded = payload.loads(raw)
    assert value is None or loaded == value


@given(JSON)
def test_what_is_written_is_read_back(value: object) -> None:
    payload.check(value)
    assert payload.loads(payload.dumps(value).encode()) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, object(), "\ud800", 2**64])
def test_values_that_cannot_be_stored(value: object) -> None:
    with pytest.raises(InvalidInput):
        payload.check(value)
