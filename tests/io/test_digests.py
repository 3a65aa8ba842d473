"""Digests computed beside the writing are those of the data, whatever the chunks."""

from __future__ import annotations

import hashlib
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.io import _digests
from loratools.io._digests import Digest, Running


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(0, 120), st.integers(0, 120))
@settings(max_examples=60, deadline=None)
def test_a_part_of_the_data_is_hashed_across_chunks(chunks, start, length):
    asked = {"whole": Digest(), "part": Digest(8, b"head", start, start + length)}
    with Running(asked) as running:
        for chunk in chunks:
            running.update(memoryview(chunk))
            running.keep_up()
    data = b"".join(chunks)
    assert running.values() == {
        "whole": hashlib.sha256(data).hexdigest(),
        "part": hashlib.sha256(b"head" + data[start : start + length]).hexdigest()[:8],
    }


def test_little_waits_at_any_time(monkeypatch):
    monkeypatch.setattr(_digests, "_AHEAD", 100)
    with Running({"x": Digest()}) as running:
        for _ in range(50):
            running.update(memoryview(bytes(60)))
            running.keep_up()
            assert running._held <= 100
    assert running.values() == {"x": hashlib.sha256(bytes(3000)).hexdigest()}


def test_an_error_of_the_thread_is_the_caller_s():
    with Running({"x": Digest()}) as running:
        running.update(memoryview(b"every other byte")[::2])
        running.update(memoryview(b"some"))
    with pytest.raises(TypeError, match="contiguous"):
        running.values()


def test_an_error_of_the_caller_leaves_no_thread_behind():
    before = threading.active_count()

    def write() -> None:
        with Running({"x": Digest()}) as running:
            running.update(memoryview(b"some"))
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write()
    assert threading.active_count() == before


def test_without_digests_there_is_no_thread():
    before = threading.active_count()
    with Running({}) as running:
        running.update(memoryview(b"some"))
        assert threading.active_count() == before
    assert running.values() == {}
