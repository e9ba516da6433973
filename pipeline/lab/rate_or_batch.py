"""Which is it, the learning rate or the batch? The diagnosis of the pipeline, on faults planted here.

Enters: a stream of clicks whose truth is known, and faults of several strengths. Leaves: what a step did to the loss of its own
rows and of others under each fault, and the verdict of the pipeline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from matplotlib.axes import Axes

from pipeline.evaluation.diagnosis import Part, Verdict
from pipeline.lab.experiment import Cell, Finding, main_of
from pipeline.lab.faulty_stream import DAYS, Fault, Found, diagnosed
from pipeline.lab.figures import canvas, legend, name_axes
from pipeline.publishing.plots import BLUE, ORANGE

SHORT: Mapping[Verdict | None, str] = {
    "healthy": "healthy",
    "learning_rate_too_high": "rate",
    "noise_limited": "batch",
    "drift": "drift",
    None: "not judged",
}
"""What a verdict blames."""


PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Mean change of the log loss by a step, nats."""

    own: float
    """On the rows that it learned."""
    other: float
    """On rows that nothing was learned from yet."""


def run(
    *,
    rate_times: tuple[float, ...] = (3.0, 10.0, 30.0),
    batch_sizes: tuple[int, ...] = (64, 16, 8),
    seeds: tuple[int, ...] = (100,),
    days: int = DAYS,
) -> Finding:
    """A run that does not learn well tells whether its rate or its batch is to blame.

    Args:
        rate_times: strengths of a rate too high, above 1, on all learning rates.
        batch_sizes: strengths of a batch too small, below the healthy 256.
        seeds: of streams.
        days: that are learned without a fault; after fewer than 2 no hour is compared with one of an earlier day.
    """
    faults = planted(rate_times, batch_sizes)
    found = {seed: diagnosed(seed, faults, days=days) for seed in seeds}
    verdicts = {fault.name: [found[seed][fault.name].diagnosis.verdict for seed in seeds] for fault in faults}
    seen = {fault.name: seen_of([found[seed][fault.name] for seed in seeds]) for fault in faults}
    figure, panels = canvas(len(PARTS), panel_inches=4.2)
    for axes, part in zip(panels, PARTS, strict=True):
        draw(axes, {fault.name: seen[fault.name][part] for fault in faults}, verdicts)
        name_axes(axes, f"A {part} step, and what is blamed", "change of the log loss (nats)", "")
    legend(panels[0], loc="center right", fontsize=10, handlelength=0.8)
    correct = {fault.name: verdicts[fault.name].count(fault.expected) for fault in faults}
    return Finding(
        name="rate_or_batch",
        question="Which is it, the learning rate or the batch?",
        sentence=sentence(faults, verdicts),
        columns=(
            "planted",
            "blamed",
            "named correctly",
            *(f"{part} step on {rows} rows (nats)" for part in PARTS for rows in ("own", "other")),
        ),
        rows=tuple(_row(fault, verdicts[fault.name], correct[fault.name], seen[fault.name]) for fault in faults),
        figure=figure,
        metrics={"share_named_correctly": sum(correct.values()) / (len(faults) * len(seeds))}
        | {f"named_{fault.name.replace(' ', '_')}": correct[fault.name] / len(seeds) for fault in faults},
    )


def planted(rate_times: Sequence[float], batch_sizes: Sequence[int]) -> tuple[Fault, ...]:
    """Faults of each kind and strength, and none."""
    return (
        Fault(name="healthy", expected="healthy"),
        *(Fault(name=f"rate x {times:g}", expected="learning_rate_too_high", rate_times=times) for times in rate_times),
        *(Fault(name=f"batch {size}", expected="noise_limited", batch_size=size) for size in batch_sizes),
        Fault(name="drift", expected="drift", drifts=True),
    )


def seen_of(found: Sequence[Found]) -> dict[Part, Seen]:
    """Means over the steps of each part that were probed."""
    seen: dict[Part, Seen] = {}
    for part in PARTS:
        steps = [step for one in found for step in one.probed.steps if step.part == part]
        seen[part] = Seen(
            own=float(np.mean([step.same_after - step.same_before for step in steps])),
            other=float(np.mean([step.other_after - step.other_before for step in steps])),
        )
    return seen


def draw(axes: Axes, seen: Mapping[str, Seen], verdicts: Mapping[str, Sequence[Verdict | None]]) -> None:
    """A line a fault."""
    for place, (name, one) in enumerate(seen.items()):
        axes.plot([one.own, one.other], [place, place], color="#b0b0b0", lw=1.5, zorder=1)
        axes.plot(one.own, place, "o", color=BLUE, ms=9, label=None if place else "rows that it learned")
        axes.plot(one.other, place, "s", color=ORANGE, ms=7, label=None if place else "rows not yet learned")
        blamed = "/".join(sorted({SHORT[verdict] for verdict in verdicts[name]}))
        axes.annotate(blamed, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=11)
    axes.axvline(0, color="#6b6b6b", lw=1)
    axes.set_xscale("symlog", linthresh=0.0003)
    furthest = 2 * max(max(abs(one.own), abs(one.other)) for one in seen.values())
    axes.set_xlim(-furthest, furthest)
    ticks = [sign * tick for sign in (-1, 1) for tick in (0.001, 0.1) if tick < furthest]
    axes.set_xticks([*ticks, 0], [f"{tick:g}" for tick in [*ticks, 0]])
    axes.minorticks_off()
    axes.tick_params(axis="x", labelsize=9.5)
    axes.set_yticks(range(len(seen)), list(seen))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def sentence(faults: Sequence[Fault], verdicts: Mapping[str, Sequence[Verdict | None]]) -> str:
    """The answer."""
    runs = sum(len(of) for of in verdicts.values())
    named = sum(list(verdicts[fault.name]).count(fault.expected) for fault in faults)
    confused = {"learning_rate_too_high": "noise_limited", "noise_limited": "learning_rate_too_high"}
    wrong = [fault.name for fault in faults if confused.get(fault.expected) in verdicts[fault.name]]
    missed = [
        f"{fault.name} ({', '.join(sorted({SHORT[verdict] for verdict in verdicts[fault.name] if verdict != fault.expected}))})"
        for fault in faults
        if any(verdict != fault.expected for verdict in verdicts[fault.name])
    ]
    took = f"it took {' and '.join(wrong)} for the other of rate and batch" if wrong else "it never took rate for batch"
    rest = f"; not named: {', '.join(missed)}" if missed else ""
    return f"The diagnosis names {named} of {runs} planted states, and {took}{rest}."


def _row(fault: Fault, verdicts: Sequence[Verdict | None], correct: int, seen: Mapping[Part, Seen]) -> tuple[Cell, ...]:
    blamed = ", ".join(sorted({SHORT[verdict] for verdict in verdicts}))
    changes = [change for part in PARTS for change in (seen[part].own, seen[part].other)]
    return (fault.name, blamed, f"{correct} of {len(verdicts)}", *changes)


if __name__ == "__main__":
    main_of(run)
