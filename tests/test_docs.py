"""Documentation that a reader can rely on: nothing is there in the package without its row in the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loratools.registry import scan

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    ("loratools.formats", "FORMAT", "formats.md"),
    ("loratools.kinds", "KIND", "formats.md"),
    ("loratools.archs", "ARCH", "architectures.md"),
    ("loratools.methods", "METHOD", "methods.md"),
]


@pytest.mark.parametrize(("package", "constant", "page"), ROWS)
def test_everything_has_its_row(package: str, constant: str, page: str) -> None:
    rows = [line for line in (ROOT / "docs" / page).read_text("utf-8").splitlines() if line.startswith("|")]
    cells = " ".join(line.split("|")[1] for line in rows)
    missing = [name for name in scan(package, constant) if f"`{name}`" not in cells]
    assert not missing, f"docs/{page} has no row for {missing}"


def test_every_method_option_is_documented() -> None:
    text = (ROOT / "docs" / "methods.md").read_text("utf-8")
    names = {
        option.name for method in scan("loratools.methods", "METHOD").values() for option in method.options
    }
    assert not [name for name in names if f"`--{name}`" not in text]


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


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
