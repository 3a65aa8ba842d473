"""docs/cli.md from the commands' own help: ``python -m tests.cli.render_docs`` writes it anew."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from loratools.cli import COMMANDS, cli

DOCS = Path(__file__).resolve().parents[2] / "docs" / "cli.md"

_INTRO = """\
# The command line

What `--help` says, command by command. This page is written by `python -m tests.cli.render_docs`, and a test
holds it to the tool.

Messages and progress go to stderr, reports and JSON to stdout. With `--json`, stdout holds one JSON document and
nothing else; NaN and Infinity are `null` in it. `python -m loratools` is the same as `loratools`.
"""


def help_of(*command: str) -> str:
    """What ``loratools COMMAND --help`` prints on a terminal of 80 columns, where click keeps two free."""
    result = CliRunner().invoke(cli, [*command, "--help"], prog_name="loratools", terminal_width=78)
    assert result.exit_code == 0, result.output
    return result.stdout


def page() -> str:
    """The whole page."""
    parts = [_INTRO]
    for command in ((), *((name,) for name in sorted(COMMANDS))):
        title = " ".join(("loratools", *command))
        parts.append(f"## {title}\n\n```text\n$ {title} --help\n{help_of(*command)}```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    DOCS.write_text(page(), "utf-8", newline="\n")
