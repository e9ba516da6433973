"""What an experiment hands back, and how it becomes a command of its own.

Enters: a `run` function with keyword parameters, all with defaults. Leaves: its `Finding`, printed; its figure as a file.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cyclopts
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from data_schemas.errors import ConfigError, TidemarkError
from pipeline.lab.figures import small_png

Cell = str | float | int | None
Run = Callable[..., "Finding"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer to one question."""

    name: str
    """Of the module, such as `noise_scale`; figures and runs are named after it."""
    question: str
    """Or the claim that is put to the test."""
    sentence: str
    """The answer, made from the result: it says so where the result contradicts the claim."""
    columns: tuple[str, ...]
    """Of the table; units are in their names."""
    rows: tuple[tuple[Cell, ...], ...]
    """Of the table; None is shown as a dash."""
    figure: Figure = field(repr=False, compare=False)
    metrics: Mapping[str, float]
    """Figures that the sentence rests on, by name."""

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(f"the table of {self.name} has {len(self.columns)} columns, but the row {wrong[0]}")

    def cells(self) -> list[list[str]]:
        """The table's rows as text."""
        return [[shown(cell) for cell in row] for row in self.rows]


def shown(cell: Cell) -> str:
    """A cell as text: four significant digits.

    >>> [shown(cell) for cell in (None, 12345, 12345.6, 0.1234567, 1.5e-7, "all")]
    ['-', '12,345', '12,346', '0.1235', '1.5e-07', 'all']
    """
    match cell:
        case None:
            return "-"
        case str():
            return cell
        case int():
            return f"{cell:,}"
        case _:
            return f"{cell:,.0f}" if 1000 <= abs(cell) < 1e9 else f"{cell:.4g}"


def parameters_of(run: Run, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every parameter of an experiment with its value: as given, else its default.

    Raises:
        ConfigError: a parameter that the experiment does not have.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(run).parameters.items()}
    if unknown := sorted(set(given or {}) - set(defaults)):
        raise ConfigError(f"{run.__module__} has no parameter {', '.join(unknown)}; it has {', '.join(defaults)}")
    return defaults | dict(given or {})


def refuse_out_of_range(run: Run, given: Mapping[str, Any]) -> None:
    """Numbers are above 0 where the default is, and at least 0 where that is 0; where it is negative, anything goes.

    Raises:
        ConfigError: the parameter, its value and what is allowed.
    """
    defaults = parameters_of(run)
    for name, value in given.items():
        least = min(_numbers(defaults[name]), default=-1)
        wrong = [number for number in _numbers(value) if number < 0 or (number == 0 and least > 0)]
        if least >= 0 and wrong:
            raise ConfigError(f"{name} must be {'above' if least > 0 else 'at least'} 0, got {wrong[0]}")
        if isinstance(value, tuple) and not value:
            raise ConfigError(f"{name} must have at least one value; leave it out for {_in_words(defaults[name])}")


def main_of(run: Run, words: Sequence[str] | None = None) -> None:
    """Runs an experiment with the parameters in `words` (None: the command line), and prints what it found.

    `--figure PATH` writes the figure. Ends the process: 0, or 1 after one line that says which parameter was wrong.
    """
    app = cyclopts.App(
        name=f"python -m {_module_of(run)}",
        default_command=_as_command(run),
        default_parameter=cyclopts.Parameter(negative=()),
        version_flags=[],
    )
    arguments = list(sys.argv[1:] if words is None else words)
    if {"--help", "-h"} & set(arguments):
        app.help_print([])
        sys.exit(0)
    try:
        command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
        command(*bound.args, **bound.kwargs)
    except (TidemarkError, cyclopts.CycloptsError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        sys.exit(1)
    sys.exit(0)


def print_finding(finding: Finding, console: Console) -> None:
    """Question, table and sentence."""
    console.print(finding.question, style="bold", markup=False, highlight=False)
    table = Table()
    for number, name in enumerate(finding.columns):
        table.add_column(name, justify="right" if number else "left")
    for cells in finding.cells():
        table.add_row(*cells)
    console.print(table)
    console.print(finding.sentence, markup=False, highlight=False)


def _as_command(run: Run) -> Callable[..., None]:
    """`run` with one parameter more, that prints instead of handing back."""

    def command(*, figure: Path | None = None, **given: Any) -> None:
        refuse_out_of_range(run, given)
        finding = run(**given)
        print_finding(finding, Console(width=None if sys.stdout.isatty() else 140))
        if figure is not None:
            figure.write_bytes(small_png(finding.figure))

    own = inspect.signature(run, eval_str=True).parameters.values()
    figure = inspect.Parameter("figure", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Path | None)
    signature = inspect.Signature([*own, figure], return_annotation=None)
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    command.__doc__ = f"{inspect.getdoc(run)}\n    figure: File that the figure is written to, as PNG."
    return command


def _in_words(values: Any) -> str:
    """A default in words.

    >>> _in_words((1, 2))
    '1, 2'
    """
    return ", ".join(map(str, values)) if isinstance(values, tuple) else str(values)


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, tuple) else (value,)
    return [number for number in values if isinstance(number, int | float) and not isinstance(number, bool)]


def _module_of(run: Run) -> str:
    """Of a module that is run as a command, the name that it is imported by."""
    spec = getattr(sys.modules[run.__module__], "__spec__", None)
    return run.__module__ if spec is None else str(spec.name)
