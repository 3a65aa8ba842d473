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

## How a run ends

| status | when | what is left |
|---|---|---|
| 0 | done, whole | the output |
| 1 | refused or failed; the message says why | nothing, or with `--resume` what can be gone on with |
| 2 | wrong usage | nothing: no file was looked at |
| 130, 143, 129 | ended by Ctrl-C, SIGTERM, SIGHUP (a closed terminal; not under `nohup`) | as for 1 |

- **Interrupted once**, a run ends in order: work that has begun is waited for, what is half-written is removed. With
  `--resume` it is kept, and a sentence says so; the same command with `--resume` goes on from there, with `--clean` it
  removes what is left. The output is there and whole, or not there. **Interrupted twice**, it ends at once, with the
  same status, and says what may be left and how it is removed.
- **A reader that has gone** (`loratools info FILE | head -1`) is no failure: the status is that of the work, mostly 0,
  and nothing is said. A closed stdout is none either.
- **A full device** is one for what only prints: status 1. Where an output was written, the status is 0, and a warning
  on stderr says that the report could not be. Messages that stderr does not take change no status.

## What is shown

- **Names from files** are never sent to a terminal as they are: control characters, line breaks, changes of direction
  and what else hides are shown as escapes (`\\x1b`, `\\n`, `\\u202e`). JSON is printable ASCII and has its own.
- **Characters that the terminal lacks** (by its encoding: `LC_ALL`, `PYTHONIOENCODING`, a code page) have twins in
  ASCII where they are ours (`dW`, `||`, `sum`), and are escapes where they are a name's.
- **Colours** are for terminals. `NO_COLOR` or `CLICOLOR=0` turns them off, `FORCE_COLOR` or `CLICOLOR_FORCE` on in a
  pipe. `TERM=dumb` has neither colours nor a progress bar; `COLUMNS` is the width, of at least 20.
- **Windows** has no files of some names (`aux.safetensors`, `a:b`, a dot at the end): such an output is refused before
  any work. The names in a pack are ones that every system can hold.
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
