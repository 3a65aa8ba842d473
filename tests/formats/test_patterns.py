"""Regular expressions of configurations: the same matches as Python's own, in bounded time."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loratools.errors import MalformedFileError
from loratools.formats import _patterns

NAME = "model.layers.0.self_attn.q_proj"
PIECES = [
    *"ab.|()*+?^$",
    r"\.",
    r"\w",
    r"\d",
    r"\b",
    "[ab]",
    "[^a]",
    "{2}",
    "{1,2}",
    "{,2}",
    "(?:",
    "{",
    "a{2,}",
]
# Each would keep Python's own engine busy for longer than anybody waits.
ENDLESS = [r"((\w|\.)*)*!", "(a+)+b", "(a?){40}a{40}", ".*" * 30 + "!", "(a|a)*b"]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.text("ab.1{", max_size=6))
def test_the_same_names_are_matched(text: str, name: str) -> None:
    try:
        own = re.compile(text)
        found = _patterns.pattern(text)
    except (re.error, MalformedFileError):
        assume(False)
    assert found.matches(name) == (own.fullmatch(name) is not None)
    by_peft = re.match(rf"(.*\.)?({text})$", name) is not None
    assert _patterns.pattern(text, tail=True).matches(name) == by_peft


@pytest.mark.parametrize("text", ENDLESS)
@pytest.mark.parametrize("tail", [False, True])
def test_patterns_with_too_many_ways_come_to_an_end(text: str, tail: bool) -> None:
    assert not _patterns.pattern(text, tail=tail).matches(NAME + "a" * 60)


@pytest.mark.parametrize("text", ["(?=(a+)+b)x", r"(a|b)*(\w+)*\2!", "(a{60000}){60000}"])
def test_what_cannot_be_followed_is_refused(text: str) -> None:
    with pytest.raises(MalformedFileError, match="too many ways") as caught:
        _patterns.pattern(text)
    assert caught.value.expected
    assert caught.value.todo


@pytest.mark.parametrize("text", ["q_proj(", "a)(b", "(" * 5000 + ")" * 5000, "a{9999999999999}"])
@pytest.mark.parametrize("tail", [False, True])
def test_what_is_no_pattern_is_an_error_of_res_own(text: str, tail: bool) -> None:
    with pytest.raises(re.error):
        _patterns.pattern(text, tail=tail)


@pytest.mark.parametrize(
    ("text", "matched"),
    [
        (r"^(?!.*visual).*(?:q_proj|k_proj)$", True),
        (r"^(?!.*layers).*(?:q_proj|k_proj)$", False),
        (r".*?(?:language|layers).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?", True),
        (r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:q_proj|k_proj)))", True),
    ],
)
def test_patterns_as_trainers_write_them(text: str, matched: bool) -> None:
    assert _patterns.pattern(text).matches(NAME) is matched
