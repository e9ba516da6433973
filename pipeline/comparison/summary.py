"""What the runs say together: one line a strategy, with intervals over seeds and differences from the reference.

Enters: `StrategyRun`s. Leaves: a `Comparison`; pure.

AUC and log loss of a run are means of its windows' figures before learning, weighted by rows, after the warm-up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_schemas.errors import ConfigError
from pipeline.comparison.run import StrategyRun, WindowRun
from pipeline.comparison.statistics import Estimate, PairedDifference, holm, mean_with_interval, paired_difference


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """One strategy with one seed in a few numbers."""

    auc: float
    log_loss: float
    rows_learned: float
    rows_left: float
    """Of the stream, but for its last window, which nobody learns."""
    seconds: float
    """Of learning."""
    steps: float
    skipped_steps: float
    probe_spread: float
    """Standard deviation of the probe's log loss over the places of a window, its start among them; root mean square over the
    judged windows; nats."""
    auc_change: float
    """Mean absolute change of AUC from a judged window to the next."""


@dataclass(frozen=True, kw_only=True)
class StrategyFigures:
    """A line of the table."""

    strategy: str
    seeds: int
    """Runs that came to the end."""
    diverged: int
    """Runs that gave up because the loss stayed non-finite; they are in no other figure, and there is no figure but these two
    where any is."""
    auc: Estimate | None = None
    log_loss: Estimate | None = None
    auc_difference: PairedDifference | None = None
    """From the reference; None for the reference itself."""
    adjusted_p: float | None = None
    """Of `auc_difference`, Holm-corrected for the number of strategies that are compared with the reference."""
    rows_learned: float = 0.0
    rows_left: float = 0.0
    seconds: float = 0.0
    steps: float = 0.0
    skipped_steps: float = 0.0
    probe_spread: Estimate | None = None
    auc_change: Estimate | None = None
    """Means over seeds, all of them."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The table, and the runs that it was made from."""

    reference: str
    first_judged: int
    """Hours since 1970: windows that start earlier are the warm-up."""
    lines: tuple[StrategyFigures, ...]
    """In the order of the strategies."""
    runs: tuple[StrategyRun, ...]
    """By strategy, then by seed."""

    def line(self, strategy: str) -> StrategyFigures:
        """Of that strategy."""
        return next(line for line in self.lines if line.strategy == strategy)

    def runs_of(self, strategy: str) -> list[StrategyRun]:
        """Of that strategy, by seed."""
        return [run for run in self.runs if run.strategy == strategy]

    def judged(self, run: StrategyRun) -> list[WindowRun]:
        """The windows whose figures count."""
        return judged_windows(run, self.first_judged)


def compare(runs: Sequence[StrategyRun], *, strategies: Sequence[str], reference: str, warmup_hours: int) -> Comparison:
    """The table of all runs.

    Args:
        strategies: names, in the order of the lines.
        reference: one of them.
        warmup_hours: windows that start earlier after the stream's start are not judged.

    Raises:
        ConfigError: no window with both classes is left to judge, or the reference diverged.
    """
    ordered = sorted(runs, key=lambda run: (strategies.index(run.strategy), run.seed))
    first = min(run.windows[0].start for run in ordered if run.windows) + warmup_hours
    comparison = Comparison(reference=reference, first_judged=first, lines=(), runs=tuple(ordered))
    figures = {name: _figures_by_seed(comparison, name, warmup_hours) for name in strategies}
    if figures[reference] is None:
        raise ConfigError(f"the reference {reference!r} diverged; name another one, or lower its learning rates")
    lines = [_line(name, figures[name], figures[reference], comparison) for name in strategies]
    return replace(comparison, lines=tuple(_corrected(lines)))


def judged_windows(run: StrategyRun, first_judged: int) -> list[WindowRun]:
    """The windows that start at `first_judged` (hours since 1970) or later and have an AUC."""
    return [w for w in run.windows if w.start >= first_judged and w.before is not None and w.before.auc is not None]


def figures_of(run: StrategyRun, first_judged: int) -> RunFigures | None:
    """The figures of one run; None where it diverged or no window is judged."""
    judged = judged_windows(run, first_judged)
    if run.diverged or not judged:
        return None
    weights = [window.rows for window in judged]
    aucs = [window.before.auc for window in judged if window.before is not None and window.before.auc is not None]
    losses = [window.before.log_loss for window in judged if window.before is not None]
    return RunFigures(
        auc=float(np.average(aucs, weights=weights)),
        log_loss=float(np.average(losses, weights=weights)),
        rows_learned=float(sum(window.rows_learned for window in run.windows)),
        rows_left=float(sum(window.rows_left for window in run.windows)),
        seconds=sum(window.seconds for window in run.windows),
        steps=float(sum(window.steps for window in run.windows)),
        skipped_steps=float(sum(window.skipped_steps for window in run.windows)),
        probe_spread=_probe_spread(run, first_judged),
        auc_change=float(np.abs(np.diff(aucs)).mean()) if len(aucs) > 1 else 0.0,
    )


def _probe_spread(run: StrategyRun, first_judged: int) -> float:
    by_window: dict[int, list[float]] = {}
    for point in run.probe:
        if run.windows[point.window].start >= first_judged:
            by_window.setdefault(point.window, []).append(point.log_loss)
    variances = [float(np.var(losses, ddof=1)) for losses in by_window.values() if len(losses) > 1]
    return float(np.sqrt(np.mean(variances))) if variances else 0.0


def _figures_by_seed(comparison: Comparison, strategy: str, warmup_hours: int) -> list[RunFigures] | None:
    """None where a run diverged: a mean over the seeds that went well would flatter the strategy."""
    runs = comparison.runs_of(strategy)
    if any(run.diverged for run in runs):
        return None
    figures = [figures_of(run, comparison.first_judged) for run in runs]
    if any(one is None for one in figures):
        raise ConfigError(
            f"nothing is left to judge after a warm-up of {warmup_hours} hours: no later window has clicks and non-clicks; "
            "use fewer warmup_hours or more hours"
        )
    return [one for one in figures if one is not None]


def _line(
    name: str, figures: list[RunFigures] | None, reference: list[RunFigures] | None, comparison: Comparison
) -> StrategyFigures:
    runs = comparison.runs_of(name)
    diverged = sum(bool(run.diverged) for run in runs)
    if figures is None or reference is None:
        return StrategyFigures(strategy=name, seeds=len(runs) - diverged, diverged=diverged)

    def over_seeds(figure: Callable[[RunFigures], float]) -> list[float]:
        return [figure(one) for one in figures]

    aucs = over_seeds(lambda one: one.auc)
    others = [one.auc for one in reference]
    return StrategyFigures(
        strategy=name,
        seeds=len(runs),
        diverged=0,
        auc=mean_with_interval(aucs),
        log_loss=mean_with_interval(over_seeds(lambda one: one.log_loss)),
        auc_difference=None if name == comparison.reference else paired_difference(aucs, others),
        rows_learned=float(np.mean(over_seeds(lambda one: one.rows_learned))),
        rows_left=float(np.mean(over_seeds(lambda one: one.rows_left))),
        seconds=float(np.mean(over_seeds(lambda one: one.seconds))),
        steps=float(np.mean(over_seeds(lambda one: one.steps))),
        skipped_steps=float(np.mean(over_seeds(lambda one: one.skipped_steps))),
        probe_spread=mean_with_interval(over_seeds(lambda one: one.probe_spread)),
        auc_change=mean_with_interval(over_seeds(lambda one: one.auc_change)),
    )


def _corrected(lines: Sequence[StrategyFigures]) -> list[StrategyFigures]:
    compared = [line for line in lines if line.auc_difference is not None]
    adjusted = holm([line.auc_difference.p_value for line in compared if line.auc_difference is not None])
    by_name = {line.strategy: p for line, p in zip(compared, adjusted, strict=True)}
    return [replace(line, adjusted_p=by_name.get(line.strategy)) for line in lines]
