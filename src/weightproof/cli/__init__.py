"""The command line: one verb per plug-in of the group `weightproof.commands`.

A verb is a plain function with typer annotations whose module imports heavy libraries inside its
functions, so that `weightproof --help` answers at once; a typer application is a verb with verbs of its own.
Exit codes: 0 done (kept, valid), 1 the work ended with a negative answer (rejected, invalid), 2 undecided,
3 usage or bad input (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from typing import Annotated

import typer

from weightproof import __version__
from weightproof.errors import InputError, WeightproofError
from weightproof.registry import plugins

BAD_INPUT = 3
_USAGE = 2  # what typer itself exits with for wrong usage; with us 2 means undecided
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and leave the process with its exit code.

    Args:
        argv: Arguments after the program's name; those of the process when None.

    Raises:
        SystemExit: Always, with the exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = typer.main.get_command(_application())
    try:
        command.main(args=arguments, prog_name="weightproof")
    except WeightproofError as error:
        _say(f"error: {error}")
        raise SystemExit(BAD_INPUT) from None
    except OSError as error:  # a full disk, a folder that may not be written
        _say(f"error: {error.filename or 'file system'}: {error.strerror or error}")
        raise SystemExit(BAD_INPUT) from None
    except KeyboardInterrupt:
        _say("interrupted: stopped before the end, so what was being written may be incomplete.")
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as stop:  # typer turns an interrupt inside a verb into this code, silently
        if stop.code == INTERRUPTED:
            _say("interrupted: stopped before the end, so what was being written may be incomplete.")
        if stop.code == _USAGE and not isinstance(stop.__context__, typer.Exit):  # no verb asked for it
            raise SystemExit(BAD_INPUT) from None
        raise


def _application() -> typer.Typer:
    app = typer.Typer(
        name="weightproof",
        help="Prove, step by step, that a change of weights did not break the model, and take it back when it did.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback()(_global_options)
    for name, entry in plugins("weightproof.commands").items():
        verb = _verb(name, entry)
        if isinstance(verb, typer.Typer):
            app.add_typer(verb, name=name)
        else:
            app.command(name)(verb)
    return app


def _show(asked: bool) -> None:
    if asked:
        typer.echo(f"weightproof {__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and leave.", is_eager=True, callback=_show),
    ] = False,
) -> None:
    del version  # handled eagerly by its callback


def _verb(name: str, entry: EntryPoint) -> Callable[..., None] | typer.Typer:
    """The function (or the application) behind a verb; one that cannot be imported says so when it is called."""
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        reason = f"the verb {name!r} cannot be loaded from {entry.value}: {error}; reinstall the package that offers it"

    def unavailable() -> None:
        raise InputError(reason)

    unavailable.__doc__ = f"(cannot be loaded from {entry.value})"
    return unavailable


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
