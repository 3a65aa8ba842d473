"""Constants are collected by the presence of files; duplicates and gaps are faults of the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loratools.registry import scan


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    name = f"scanned_{abs(hash(request.node.name))}"

    def build(**files: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        for stem, text in files.items():
            (folder / f"{stem}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        return name

    yield build
    for module in [found for found in sys.modules if found.split(".")[0] == name]:
        del sys.modules[module]


def thing(name: str) -> str:
    return f"from types import SimpleNamespace\nTHING = SimpleNamespace(name={name!r})\n"


def test_every_public_file_is_collected_in_order(package) -> None:
    found = scan(package(b=thing("two"), a=thing("one"), _helper="raise RuntimeError"), "THING")
    assert list(found) == ["one", "two"]


def test_the_mapping_cannot_be_changed(package) -> None:
    found = scan(package(a=thing("one")), "THING")
    with pytest.raises(TypeError):
        found["two"] = 2  # type: ignore[index]


def test_a_file_without_the_constant_is_a_fault(package) -> None:
    with pytest.raises(RuntimeError, match="defines no THING"):
        scan(package(a=thing("one"), b="x = 1"), "THING")


def test_two_of_one_name_are_a_fault(package) -> None:
    with pytest.raises(RuntimeError, match="'one' exists already"):
        scan(package(a=thing("one"), b=thing("one")), "THING")


@pytest.mark.parametrize(
    ("name", "constant"), [("kinds", "KIND"), ("formats", "FORMAT"), ("archs", "ARCH"), ("methods", "METHOD")]
)
def test_the_packages_own_files_are_whole(name: str, constant: str) -> None:
    found = scan(f"loratools.{name}", constant)
    folder = Path(sys.modules[f"loratools.{name}"].__path__[0])
    assert len(found) == len(list(folder.glob("[!_]*.py")))
    assert all(value.name == key for key, value in found.items())
