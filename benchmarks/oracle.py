"""How much is there to learn in the synthetic stream, and how much of it does Vowpal Wabbit learn?

In:  nothing. Out: a table for a short and for a long stream of the same law: AUC and log loss of the oracle, of a constant, and
     of Vowpal Wabbit's settings, under hourly test-then-train: each hour is predicted whole, then learned in one pass.

    pip install vowpalwabbit
    python benchmarks/oracle.py [--hours 24 120] [--seed 0]

Figures are means of the hourly ones weighted by rows, from the second hour on. All settings run on the first stream; the best
three by AUC run on the others.
"""

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.data.synthetic import SyntheticConfig, SyntheticHour, SyntheticStream
from pipeline.evaluation.metrics import Metrics, measure

LEAST_MARGIN = 0.02
"""By so much AUC the oracle has to beat the best of the others, or the stream has nothing left to learn."""

CROSSES = "-q na -q nc -q gp -q nt"
MORE_CROSSES = f"{CROSSES} -q ui -q ua -q uc"
SETTINGS = (
    "",
    "-l 0.2",
    "--ftrl",
    CROSSES,
    f"{CROSSES} -l 0.1",
    f"{CROSSES} -l 0.3",
    f"{CROSSES} --ftrl",
    f"{CROSSES} --coin",
    f"{MORE_CROSSES} -l 0.1",
    f"{MORE_CROSSES} --ftrl",
    "--interactions :: -l 0.1",
)
"""Vowpal Wabbit's default update is the adaptive, normalised, invariant one; `-l` is its learning rate."""

NAMESPACES = {
    "u": "user_id",
    "i": "item_id",
    "c": "category",
    "a": "author_id",
    "g": "device",
    "n": "country",
    "p": "placement",
}
NUMBERS: Mapping[str, Callable[[float], float]] = {
    "item_price": math.log1p,
    "item_age_hours": math.log1p,
    "user_age": lambda years: years / 50,
    "position": math.log1p,
}

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One line of the table."""

    rows: int
    system: str
    auc: float
    log_loss: float


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--hours", type=int, nargs="+", default=[24, 120], help="lengths of the streams")
    cli.add_argument("--seed", type=int, default=0)
    options = cli.parse_args()
    settings: Sequence[str] = SETTINGS if _has_vowpal_wabbit() else ()
    for length in options.hours:
        stream = SyntheticStream(SyntheticConfig(seed=options.seed, hours=length))
        hours = [stream.hour(index) for index in range(length)]
        known = [_score(hours, "oracle", _truths(hours)), _score(hours, "constant", _past_click_rates(hours))]
        peers = _compare_settings(hours, settings)
        _print_table(known, peers)
        settings = [score.system.removeprefix("vw ") for score in peers[:3]]


def _has_vowpal_wabbit() -> bool:
    try:
        importlib.import_module("vowpalwabbit")
    except ImportError:
        print("vowpalwabbit is not installed: only the oracle is shown; run `pip install vowpalwabbit`", file=sys.stderr)
        return False
    return True


def _truths(hours: Sequence[SyntheticHour]) -> list[F64]:
    return [hour.true_probability_R.astype(np.float64) for hour in hours]


def _past_click_rates(hours: Sequence[SyntheticHour]) -> list[F64]:
    """The click rate of all earlier hours, for every row."""
    clicks, rows, constants = 0.0, 0, []
    for hour in hours:
        constants.append(np.full(hour.table.num_rows, clicks / rows if rows else 0.5))
        clicks += hour.table["label"].to_numpy().sum()
        rows += hour.table.num_rows
    return constants


def _compare_settings(hours: Sequence[SyntheticHour], settings: Sequence[str]) -> list[Score]:
    """The settings' scores, the best AUC first."""
    if not settings:
        return []
    lines = [_as_lines(hour) for hour in hours]
    scores = []
    for arguments in settings:
        print(f"running vw {arguments}", file=sys.stderr)
        scores.append(_score(hours, f"vw {arguments}", _predict_then_learn(lines, arguments)))
    return sorted(scores, key=lambda score: -score.auc)


def _predict_then_learn(lines: Sequence[Sequence[str]], arguments: str) -> list[F64]:
    """Probabilities hour by hour, each from what the hours before taught."""
    from vowpalwabbit import Workspace  # type: ignore[import-untyped]

    learner = Workspace(f"--loss_function logistic --link logistic -b 22 --quiet {arguments}")
    predicted = []
    for hour in lines:
        examples = [learner.parse(line) for line in hour]
        predicted.append(np.array([learner.predict(example) for example in examples]))
        for example in examples:
            learner.learn(example)
            learner.finish_example(example)
    learner.finish()
    return predicted


def _as_lines(hour: SyntheticHour) -> list[str]:
    """Each row in Vowpal Wabbit's text format, a namespace a feature; what is missing is left out."""
    lines = []
    for row in hour.table.to_pylist():
        ids = "".join(f" |{space} {row[name]}" for space, name in NAMESPACES.items() if row[name] is not None)
        values = "".join(f" {name}:{scale(row[name]):.3f}" for name, scale in NUMBERS.items() if row[name] is not None)
        tags = f" |t {' '.join(row['tags'])}" if row["tags"] else ""
        lines.append(f"{1 if row['label'] else -1}{ids}{tags} |h {row['event_time'].hour} |r{values}")
    return lines


def _score(hours: Sequence[SyntheticHour], system: str, predicted: Sequence[F64]) -> Score:
    figures = [_figures(hour, chances) for hour, chances in zip(hours, predicted, strict=True)][1:]
    ranked = [figure for figure in figures if figure.auc is not None]
    return Score(
        rows=sum(hour.table.num_rows for hour in hours),
        system=system,
        auc=float(np.average([figure.auc for figure in ranked], weights=[figure.rows for figure in ranked])),
        log_loss=float(np.average([figure.log_loss for figure in figures], weights=[figure.rows for figure in figures])),
    )


def _figures(hour: SyntheticHour, chances: F64) -> Metrics:
    new_R = ~hour.is_repeat_R
    return measure(hour.table["label"].to_numpy()[new_R], chances[new_R], hour.table["user_id"].to_numpy()[new_R])


def _print_table(known: Sequence[Score], peers: Sequence[Score]) -> None:
    print(f"\n{'rows':>9}  {'AUC':>6}  {'log loss':>8}  system")
    for score in (*known, *peers):
        print(f"{score.rows:9,d}  {score.auc:6.4f}  {score.log_loss:8.4f}  {score.system}")
    if peers:
        margin = known[0].auc - peers[0].auc
        verdict = "enough" if margin >= LEAST_MARGIN else "TOO LITTLE"
        print(f"the oracle is {margin:.4f} AUC above the best peer: {verdict} (at least {LEAST_MARGIN} is wanted)")


if __name__ == "__main__":
    main()
