"""The index says what the architectures' files say, and never too little."""

from collections.abc import Mapping

import pytest

from loratools import archs
from loratools.archs import _catalog
from loratools.archs._entry import Entry, ends
from loratools.archs._index import INDEX as LINES
from loratools.archs._names import parse
from tests.archs.render_index import INDEX, page


def test_the_index_is_what_the_files_say():
    assert INDEX.read_text("utf-8") == page(), "run python -m tests.archs.render_index"


@pytest.mark.parametrize("arch", archs.all_archs().values(), ids=lambda arch: arch.name)
def test_every_name_is_promised(arch):
    """Detection resolves only what the index says may mean something."""
    line = LINES[arch.name]
    for component in arch.components:
        prefixes = {prefix for group in component.prefixes.values() for prefix in group}
        names = component.table.spellings("diffusers").values() if component.table else ()
        for name in (name for pieces in names for name in pieces):
            for prefix in prefixes:
                skeleton = parse(prefix + name.text.replace("%s", "7"))[0]
                start = parse(prefix)[0]
                head, tail = ends(skeleton[len(start) :])
                known = [reading.ends for reading in line.readings if start in reading.prefixes]
                assert any(head in heads and tail in tails for heads, tails in known), skeleton


def test_all_architectures_are_a_mapping_in_the_order_of_their_files():
    every = archs.all_archs()
    assert isinstance(every, Mapping)
    assert list(every) == sorted(every) == [arch.name for arch in every.values()]
    assert len(every) == len(list(every))
    assert every["sdxl"] is archs.get("sdxl")
    assert every.get("no-such") is None
    assert "no-such" not in every
    with pytest.raises(KeyError, match="no-such"):
        every["no-such"]


def test_files_that_the_index_does_not_list_are_read(monkeypatch):
    """A file that has just been added works before the index is written anew."""
    short = {name: line for name, line in LINES.items() if name != "flux"}
    monkeypatch.setattr(_catalog, "INDEX", short)
    read = _catalog.entries.__wrapped__()
    assert list(read) == list(LINES)
    assert isinstance(read["flux"], Entry)
    assert read["flux"] == LINES["flux"]
