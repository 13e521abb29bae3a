"""The reader of JSON Lines: numbering, blank lines, invalid lines, lists of rows."""

import pytest

from clpet.runtime.json_lines import parse_line, parse_lines, parse_rows


def test_lines_are_numbered_and_blank_ones_skipped() -> None:
    assert list(parse_lines('{"a": 1}\n\n  \n[2]\n')) == [(1, {"a": 1}), (4, [2])]


def test_a_line_separator_inside_a_string_does_not_end_a_line() -> None:
    assert list(parse_lines('"one\u2028line"\n2')) == [(1, "one\u2028line"), (2, 2)]


def test_an_invalid_line_is_yielded_as_its_error() -> None:
    (_, first), (number, error) = parse_lines("1\n{oops")
    assert (first, number) == (1, 2)
    assert isinstance(error, ValueError)
    assert str(error).startswith("invalid JSON (")
    assert "column 2" in str(error)


def test_rows_are_the_items_of_a_list_or_the_lines() -> None:
    assert list(parse_rows(' [{"a": 1}, 2]')) == [(1, {"a": 1}), (2, 2)]
    assert list(parse_rows('{"a": 1}\n2')) == [(1, {"a": 1}), (2, 2)]
    with pytest.raises(ValueError, match="delimiter"):
        list(parse_rows("[1\n2]"))


def test_bytes_that_are_not_utf8_raise() -> None:
    with pytest.raises(UnicodeDecodeError):
        parse_line(b'"\xff"')
