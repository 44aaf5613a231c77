from __future__ import annotations

from refold.errors import first_line


def test_an_error_that_says_nothing_is_named_by_its_class():
    assert first_line(ValueError("\n one thing \nand another")) == "one thing "
    assert first_line(AssertionError()) == "AssertionError"
    assert first_line(ValueError(" \n ")) == "ValueError"
