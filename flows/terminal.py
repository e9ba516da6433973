"""What a person sees of a flow: its parameters on the command line, plain lines, one line for an error, an exit code.

Enters: a flow and the words of the command line. Leaves: 0; or, after one line that says what was wrong, 1, or 75 where another
process is at work.
"""

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import cyclopts
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data_schemas.errors import StoppedByFirst, TidemarkError
from flows.early_server import server_starting
from pipeline.collector import end_quickly, nothing_collected
from pipeline.leaving import run_and_leave

if TYPE_CHECKING:
    from prefect import Flow  # takes a second to import, and commands that are no flow do without


def run_flow(flow: "Flow[..., Any]", words: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Call `flow` with the parameters in `words` (None: the command line); print one line for an error of ours.

    The module that the flow's file names as `IMPORTED_LATER` is imported while Prefect's temporary server starts. Among
    processes that torchrun has started only the first is a flow run; the others call the same function, and end here if
    `words` is None.

    Returns:
        The exit code: 0, or that of an error that a user can act on: 1, or 75 where another process holds the model. Any
        other exception passes through.
    """
    if not leads():
        if words is None:
            run_and_leave(lambda: run_command(flow.fn, flow.fn, name=program or flow.name))
        return run_command(flow.fn, flow.fn, words, name=program or flow.name)

    def call(*args: Any, **kwargs: Any) -> None:
        if later := flow.fn.__globals__.get("IMPORTED_LATER"):
            with server_starting(), nothing_collected():
                importlib.import_module(later)
        flow(*args, **kwargs)

    return run_command(call, flow.fn, words, name=program or flow.name)


def leads() -> bool:
    """Whether this process is the first that torchrun has started, or the only one: the others are silent."""
    return int(os.environ.get("RANK", 0)) == 0


def run_command(
    command: Callable[..., Any], declared: Callable[..., Any], words: Sequence[str] | None = None, *, name: str
) -> int:
    """`run_flow` for any function: parameters and their help are those of `declared`, and `command` is called."""
    end_quickly()
    app = cyclopts.App(
        name=name,
        default_command=declared,
        default_parameter=cyclopts.Parameter(negative=()),
        version_flags=[],
    )
    arguments = list(sys.argv[1:] if words is None else words)
    if {"--help", "-h"} & set(arguments):
        app.help_print([])
        return 0
    try:
        _, bound, _ = app.parse_args(_named(arguments), exit_on_error=False, print_error=False)
        command(*bound.args, **bound.kwargs)
    except StoppedByFirst:
        return 1
    except (TidemarkError, cyclopts.CycloptsError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {_line(error, app)}", markup=False)
        return error.exit_code if isinstance(error, TidemarkError) else 1
    return 0


def tell(line: str) -> None:
    """Log `line` to Prefect where its log is shown, else print it."""
    from prefect.logging import get_logger, get_run_logger

    try:
        logger: logging.Logger | logging.LoggerAdapter[logging.Logger] = get_run_logger()
    except RuntimeError:
        logger = get_logger("flow_runs")
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    else:
        Console(soft_wrap=True, highlight=False).print(line, markup=False)


class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, doing: str, done: int | None = None, total: int | None = None) -> None:
        """Show what is `doing` now; `done` and `total` items, where they changed."""


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Advance]:
    """A progress bar on a terminal; nothing elsewhere, where every finished item tells a line of its own."""
    console = Console()
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task(what, total=total)

        def advance(doing: str, done: int | None = None, total: int | None = None) -> None:
            bar.update(shown, completed=done, total=total, description=f"{what}: {doing}" if doing else what)

        yield advance


def _named(words: Sequence[str]) -> list[str]:
    """`name=value` as `--name=value`, but for the value of an option, such as `--overrides budget.seconds=60`.

    >>> _named(["dataset=brunch", "--overrides", "model_name=x"])
    ['--dataset=brunch', '--overrides', 'model_name=x']
    """
    named = []
    for before, word in zip(["", *words], words, strict=False):
        name, sign, value = word.partition("=")
        is_value = before.startswith("--") and "=" not in before
        named.append(f"--{name.replace('_', '-')}={value}" if sign and name.isidentifier() and not is_value else word)
    return named


def _line(error: Exception, app: cyclopts.App) -> str:
    if isinstance(error, TidemarkError):
        return str(error)
    known = ", ".join(argument.name for argument in app.assemble_argument_collection())
    return f"{' '.join(str(error).split())} Parameters of {app.name[0]}: {known}"
