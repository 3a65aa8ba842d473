"""Running the command line inside the test's process."""

from __future__ import annotations

import inspect
import io

from click.testing import CliRunner, Result

from loratools.cli import cli


def invoke(*arguments: object) -> Result:
    """What a command did, with stdout and stderr apart."""
    # click 8.2 and later always keep them apart, and have no such argument.
    older = "mix_stderr" in inspect.signature(CliRunner).parameters
    runner = CliRunner(mix_stderr=False) if older else CliRunner()
    return runner.invoke(cli, list(map(str, arguments)), prog_name="loratools")


class Terminal(io.StringIO):
    """A stderr that is looked at."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        """It is."""
        return True
