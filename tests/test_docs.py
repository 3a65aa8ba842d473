"""Documentation that a reader can rely on: nothing is there in the package without its row in the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loratools import archs, formats
from loratools.ops import _probe
from loratools.registry import scan
from tests import render_tables
from tests.kinds import samples

ROOT = Path(__file__).resolve().parents[1]
ARCHS = archs.all_archs()
STORE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ROWS = [
    ("loratools.formats", "FORMAT", "formats.md"),
    ("loratools.kinds", "KIND", "formats.md"),
    ("loratools.archs", "ARCH", "architectures.md"),
    ("loratools.methods", "METHOD", "methods.md"),
]


def cells(page: str) -> list[list[str]]:
    """The rows of a page's tables, without those that are made from the code: they have rows for whatever is there."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    text = re.sub(r"<!-- table: .*?<!-- /table -->", "", text, flags=re.DOTALL)
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def names(cell: str) -> set[str]:
    """What stands between backticks."""
    return set(re.findall("`([^`]+)`", cell))


@pytest.mark.parametrize(("package", "constant", "page"), ROWS)
def test_everything_has_its_row(package: str, constant: str, page: str) -> None:
    first = " ".join(row[0] for row in cells(page))
    missing = [name for name in scan(package, constant) if f"`{name}`" not in first]
    assert not missing, f"docs/{page} has no row for {missing}"


@pytest.mark.parametrize("name", render_tables.TABLES)
def test_tables_say_what_the_code_does(name: str) -> None:
    assert render_tables.stands(name) == render_tables.block(name), "run python -m tests.render_tables"


def test_the_tables_are_of_all_layouts_that_are_written() -> None:
    assert sorted(render_tables.LAYOUTS) == sorted(formats.writable())


def test_the_tables_are_of_all_kinds_that_a_layout_can_be_asked_to_hold() -> None:
    # Whatever can be compared by probes; the others are only named, or baked.
    known = {name for name, kind in scan("loratools.kinds", "KIND").items() if kind.apply is not None}
    assert {samples.sample(name).module.kind for name in render_tables.KINDS.values()} == known


def test_architectures_are_described_with_their_components() -> None:
    stated = {row[0]: row[2] for row in cells("architectures.md") if len(row) == 4}
    for name, arch in ARCHS.items():
        assert stated[f"`{name}`"] == ", ".join(component.name for component in arch.components)


def test_relatives_that_nothing_tells_apart_are_listed() -> None:
    stated = {row[0]: row[1] for row in cells("architectures.md") if len(row) == 2 and names(row[0])}
    known = {f"`{name}`": f"`{arch.derived_from}`" for name, arch in ARCHS.items() if arch.derived_from}
    assert stated == known


def test_further_dialects_are_listed() -> None:
    rows = [row for row in cells("architectures.md") if len(row) == 3 and names(row[0])]
    tables = {(arch.name, part.name): part.table for arch in ARCHS.values() for part in arch.components}
    known = {(dialect, owner) for owner, table in tables.items() if table for dialect in table.further}
    denoisers = {(dialect, arch) for dialect, (arch, component) in known if component == "denoiser"}
    stated = {(dialect, arch) for row in rows for dialect in names(row[0]) for arch in names(row[1])}
    assert stated == denoisers
    assert {dialect for row in rows for dialect in names(row[0])} == {dialect for dialect, _ in known}


def test_layouts_are_described_with_where_their_scale_is_and_what_their_files_are_read_as() -> None:
    rows = {row[0].strip("`"): row for row in cells("formats.md") if len(row) == 5}
    text = (ROOT / "docs" / "formats.md").read_text("utf-8")
    for name, form in scan("loratools.formats", "FORMAT").items():
        assert (rows[name][3] == "yes") is (form.speller is not None), name
        assert ("`.alpha` tensor" in rows[name][2]) is (form.alpha == "tensor"), name
        for other in form.reads_as:
            assert re.search(rf"`{name}`[^.]*`{other}`", text), f"{name} is read as {other}"


def test_the_tolerances_of_verification_are_those_that_are_documented() -> None:
    stated = {row[0]: row[1] for row in cells("numerics.md") if len(row) == 2}
    known = {f"rounded to {STORE_NAMES[dtype]}": error for dtype, error in _probe._ROUNDED.items()}
    known["rounded to fewer bits"] = _probe._ROUNDED_BELOW
    known["values were copied, and alpha is stated in float32"] = _probe._EXACT
    assert {name: float(stated[name]) for name in known} == known


def test_every_method_option_is_documented() -> None:
    text = (ROOT / "docs" / "methods.md").read_text("utf-8")
    names = {
        option.name for method in scan("loratools.methods", "METHOD").values() for option in method.options
    }
    assert not [name for name in names if f"`--{name}`" not in text]


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
            file, _, anchor = link.partition("#")
            if "://" not in link:
                assert (page.parent / file).exists(), f"{page.name}: {link}"
                assert not anchor or anchor in headings(page.parent / file if file else page), (
                    f"{page.name}: {link}"
                )


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_readmes_two_commands_are_single_lines() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for name in ("run", "test"):
        block = re.search(rf"<!-- {name} -->\n```bash\n(.*?)\n```\n<!-- /{name} -->", text, re.DOTALL)
        assert block is not None
        assert "\n" not in block[1]
        assert ".ci/constraints.txt" in block[1]


def test_the_fixtures_are_what_their_script_makes(tmp_path: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_fixtures", ROOT / "fixtures" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, write in (("style-kohya", script.kohya), ("character-diffusers", script.diffusers)):
        write(tmp_path / "made.safetensors")
        ours = (ROOT / "fixtures" / f"{name}.safetensors").read_bytes()
        made = (tmp_path / "made.safetensors").read_bytes()
        # The order of metadata in the header is the writer's whim; the tensors are not.
        assert _payload(made) == _payload(ours)


def _payload(data: bytes) -> bytes:
    return data[8 + int.from_bytes(data[:8], "little") :]
