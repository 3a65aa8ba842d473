"""Documentation that a reader can rely on: nothing is there in the package without its row in the docs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from loratools import archs, formats
from loratools.cli import cli, rank_options
from loratools.ops import (
    _bake_shards,
    _extract_options,
    _network,
    _probe,
    _quantised,
    _verify_tasks,
    bake,
)
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


def test_kinds_that_cannot_be_baked_are_said_to_be_refused() -> None:
    rows = [row for row in cells("formats.md") if len(row) == 7]
    column = rows[0].index("bake")
    stated = {name: row[column] for row in rows[1:] for name in names(row[0])}
    for name, kind in scan("loratools.kinds", "KIND").items():
        assert stated[name] == ("yes" if kind.dense is not None else "refused by name"), name


def first_cells(page: str, header: str) -> set[str]:
    """What stands between backticks in the first column of the table with this first heading."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    table = re.search(rf"^\| {re.escape(header)} \|.*\n\|-[-|]*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table is not None, f"docs/{page} has no table with the heading {header!r}"
    return {name for line in table[1].splitlines() for name in names(line.split("|")[1])}


def test_roundings_are_described() -> None:
    assert first_cells("checkpoints.md", "`--rounding`") == {*bake.ROUNDINGS}


def test_ways_to_decompose_are_described() -> None:
    assert first_cells("checkpoints.md", "`--svd`") == {*_extract_options.SVDS}


def test_verdicts_are_described() -> None:
    tasks = _verify_tasks
    verdicts = {*(tasks.BAKED, tasks.PARTLY, tasks.NOT_BAKED, tasks.WRONG, tasks.UNEXPECTED, tasks.ABSENT)}
    assert first_cells("checkpoints.md", "verdict") == verdicts


def test_rank_rules_are_described_with_their_tags() -> None:
    rows = [row for row in cells("checkpoints.md") if row[0].startswith("`--") and len(row) == 3]
    described = {
        name.split()[0].removeprefix("--"): row[2].strip("`") for row in rows for name in names(row[0])
    }
    assert {*rank_options.RULES} <= described.keys()
    values: tuple[float | str, ...] = (32, 0.95, 10, 0.1, "20MB")
    for kind, value in zip(rank_options.RULES, values, strict=True):
        assert _extract_options.rule_of({kind: value})[3] == described[kind]


def test_what_baking_knows_by_name_is_listed() -> None:
    text = (ROOT / "docs" / "checkpoints.md").read_text("utf-8")
    weights = [name for name in _network.SCALES if "input" not in name]
    assert not [name for name in (*_bake_shards._STALE, *weights) if f"`{name}`" not in text]
    schemes = {*_quantised._METHODS.values()} - {"EETQ", "ModelOpt"}
    assert not [scheme for scheme in schemes if scheme not in text]


def test_options_that_are_mentioned_are_there() -> None:
    context = click.Context(cli)
    commands = [cli.get_command(context, name) for name in cli.list_commands(context)]
    known = {name for command in commands if command for param in command.params for name in param.opts}
    text = (ROOT / "docs" / "checkpoints.md").read_text("utf-8")
    assert not {*re.findall(r"`(--[a-z][a-z-]*)", text)} - known


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a page that are marked as this language."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_what_the_commands_print_is_quoted_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script, *commands = blocks("checkpoints.md", "bash")[0].splitlines()
    _, file, *arguments = script.split()
    monkeypatch.setattr("sys.argv", [file, *arguments])
    runpy.run_path(str(ROOT / file), run_name="__main__")
    printed: set[str] = set()
    # The last one again, at a strength that the result does not have.
    for command, status in (*((line, 0) for line in commands), (f"{commands[-1]} --weights 0.5", 1)):
        result = CliRunner().invoke(cli, command.split()[1:], terminal_width=100)
        assert result.exit_code == status, result.output
        printed |= {_plain(line) for line in result.stdout.splitlines()}
    quoted = {_plain(line) for block in blocks("checkpoints.md", "text") for line in block.splitlines()}
    # A model of another kind is not made here.
    assert not {line for line in quoted - printed if "lm_head" not in line}


def _plain(line: str) -> str:
    return " ".join(line.split())


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
