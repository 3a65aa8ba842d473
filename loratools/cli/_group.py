"""The group of commands: it imports a command when it is called, and turns exceptions into exit statuses."""

from __future__ import annotations

import errno
import importlib
from collections.abc import Mapping
from typing import Any

import click

from loratools.cli import failures


class Commands(click.Group):
    """Commands that live in one module each, ``<package>.<name>``, as its ``command``."""

    def __init__(
        self, *args: Any, commands_in: str = "", summaries: Mapping[str, str] = {}, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._package = commands_in
        self._summaries = dict(summaries)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """The names of all commands."""
        return sorted(self._summaries)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        cmd_name: str,
    ) -> click.Command | None:
        """A command, imported now."""
        if cmd_name not in self._summaries:
            return None
        module = importlib.import_module(f"{self._package}.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments begin with; an unknown one is answered with near misses."""
        name = args[0]
        if name not in self._summaries and not name.startswith("-"):
            import difflib

            near = difflib.get_close_matches(name, self._summaries)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(self.list_commands(ctx))}."
            ctx.fail(f"No such command {name!r}. {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        formatter: click.HelpFormatter,
    ) -> None:
        """The list of commands, from their summaries: importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(self._summaries.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a failure becomes a message and an exit status, or with --debug a traceback."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            raise failures.Interrupted() from None
        except Exception as error:
            broken_pipe = isinstance(error, OSError) and error.errno == errno.EPIPE
            # click itself ends quietly when whoever reads the output has gone.
            if broken_pipe or failures.debugging(ctx):
                raise
            raise failures.Failure(failures.message(error)) from error
