"""The group of commands: it imports a command when it is called, and turns exceptions into exit statuses."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from loratools.cli import _interrupts, failures, output
from loratools.errors import visible

LEFT = {
    "clean": "Something half-written may be left beside the output: the same command with --clean removes it.",
    "output": "Something half-written may be left beside the output, under a hidden name.",
}


class _Formatter(click.HelpFormatter):
    """Help in characters that stdout has."""

    def getvalue(self) -> str:
        """The text."""
        from loratools.report.values import fitted

        return fitted(super().getvalue(), output.encoding_of(sys.stdout))


class _Context(click.Context):
    """A command's run: an interrupted one says what it has kept."""

    formatter_class = _Formatter

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command's function; a failure becomes a message and an exit status, or with --debug a traceback."""
        try:
            return super().invoke(*args, **kwargs)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            raise failures.interrupted(self._kept()) from None
        except Exception as error:
            if failures.debugging(self):
                raise
            raise failures.Failure(failures.message(error)) from error

    def _kept(self) -> str:
        goal = self.params.get("output")
        if not self.params.get("resume") or goal is None:
            return ""
        from loratools.ops import leftovers

        if not leftovers.kept(goal):
            return ""
        return (
            f"What is done is kept in {visible(leftovers.place(goal))}: the same command with --resume goes on "
            "from there, with --clean removes it."
        )


class Commands(click.Group):
    """Commands that live in one module each, ``<package>.<name>``, as its ``command``."""

    context_class = _Context

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
        command.context_class = _Context
        options = {param.name: LEFT[param.name] for param in command.params if param.name in LEFT}
        _interrupts.leaves(options.get("clean") or options.get("output", ""))
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

    def main(  # type: ignore[override] # click's second overload alone
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **more: Any
    ) -> Any:
        """Run a command line; what click would print of an exception goes through ``failures.told``."""
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **more)
        try:
            status = super().main(args, standalone_mode=False, **more)
        except click.ClickException as error:
            status = failures.told(error)
        except click.Abort:  # an interrupt between two steps of click's own
            status = failures.interrupted().exit_code
        sys.exit(status if isinstance(status, int) else 0)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the options before the command."""
        with _while_click_reads_and_prints():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Import the command, read its options, and run it."""
        with _while_click_reads_and_prints():
            return super().invoke(ctx)


@contextmanager
def _while_click_reads_and_prints() -> Iterator[None]:
    """Around all but the command's own work: callbacks of options, --help and --version."""
    try:
        yield
    except (click.ClickException, click.Abort, click.exceptions.Exit):
        raise
    except KeyboardInterrupt:
        raise failures.interrupted() from None
    except Exception as error:
        context = click.get_current_context(silent=True)
        if context is not None and failures.debugging(context):
            raise
        if isinstance(error, OSError) and output.no_reader(error):
            output.discard(sys.stdout)
            raise click.exceptions.Exit(0) from None
        raise failures.Failure(failures.message(error)) from error
