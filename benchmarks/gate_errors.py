"""How often the gate is wrong: models that are as good as each other and rejected, and broken ones that are published.

In:  the synthetic stream, learned hour by hour by whole updates. Before each judged hour, models are made from the checkpoint
     that serves, and judged on that hour's held-out rows:
       - `as good`: two models, each from another random half of the users' rows of the hour, as champion and challenger;
       - `shuffled labels`, `ten times the rates`, `label leak`: the hour learned with its labels in random order; with the
         rates of dense network, embeddings and wide part times ten; with a number that is the label. Champion is the model
         that serves.
Out: one table: of so many, how many were rejected, held (not enough is known yet: they do not serve either) and published; of
     the models that are as good, in how many the 95 % interval of the AUC difference leaves out 0, by the bootstrap of users
     and by DeLong's formula; and what the gate costs in the updates themselves.

    python benchmarks/gate_errors.py [--as-good 400] [--broken 100] [--rows 8000]
"""

import argparse
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.examples import F32
from pipeline.config import UpdateConfig, load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.data.window_rows import WindowRows, load_rows
from pipeline.data.windows import next_window
from pipeline.evaluation.champion import past_gains, predicted
from pipeline.evaluation.gate import GateVerdict, judge
from pipeline.evaluation.paired import Paired, held_out
from pipeline.model_state import ModelState, admit_ids, restore_or_create
from pipeline.publishing.report import read_history
from pipeline.training.batch_size import batch_policy
from pipeline.training.learn import learn
from pipeline.training.step_time import StepTimeFit
from pipeline.training.threads import torch_threads
from pipeline.update import run_update

FIRST_HOURS = 16
"""Learned before the first hour that is judged, so that earlier gains are known."""
JUDGED_HOURS = 20
Alter = Callable[[WindowRows, np.random.Generator], WindowRows]


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--as-good", type=int, default=400)
    cli.add_argument("--broken", type=int, default=100)
    cli.add_argument("--rows", type=int, default=8000, help="an hour")
    options = cli.parse_args()
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    found: dict[str, list[GateVerdict]] = {name: [] for name in ("as good", *BROKEN)}
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as temporary, torch_threads(1):
        bench = _Bench(_config(Path(temporary), options.rows))
        for hour in range(FIRST_HOURS + JUDGED_HOURS):
            if hour >= FIRST_HOURS:
                for _ in range(options.as_good // JUDGED_HOURS):
                    found["as good"].append(bench.as_good())
                for name in BROKEN:
                    found[name] += [bench.broken(name) for _ in range(options.broken // JUDGED_HOURS)]
            shares.append(bench.update())
    _print(found, shares)


def _config(folder: Path, rows: int) -> UpdateConfig:
    hours = FIRST_HOURS + JUDGED_HOURS
    write_landing(SyntheticConfig(hours=hours, rows_per_hour=rows, traffic_ratio=1), folder / "landing")
    places = [f"landing={folder / 'landing'}", f"state_dir={folder / 'state'}", "tracking.enabled=false"]
    config = load_config(overrides=["dataset=synthetic", *places, "training.batch_policy=fixed", "alarms.action=off"])
    spec = load_spec(config.dataset)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=datetime.now(UTC))
    return config


@dataclass
class _Bench:
    """The stream, as far as it was learned."""

    config: UpdateConfig
    drawn: int = 0

    @property
    def spec(self) -> DatasetSpec:
        return load_spec(self.config.dataset)

    def update(self) -> float:
        """Learns the next hour; the share of the update's seconds that the gate took."""
        report = run_update(self.config)
        assert report is not None
        gate = report.seconds.get("predict as the champion", 0.0) + report.seconds.get("judge", 0.0)
        return gate / sum(report.seconds.values())

    def as_good(self) -> GateVerdict:
        self.drawn += 1
        halves: list[F32] = []
        for half in (0, 1):
            state, rows = self._next()
            chosen = held_out(rows.examples.user_R, share=0.5, salt=[self.drawn]) == bool(half)
            halves.append(_learned(self.config, self.spec, state, rows, kept=chosen))
        return self._judged(rows, halves[0], halves[1])

    def broken(self, name: str) -> GateVerdict:
        self.drawn += 1
        alter, factor = BROKEN[name]
        state, rows = self._next()
        rows = alter(rows, np.random.default_rng(self.drawn))
        champion_H = predicted(state, rows.encoded, rows.held_out)
        config = self._with_rates(factor)
        state = restore_or_create(config, self.spec)
        return self._judged(rows, champion_H, _learned(config, self.spec, state, rows))

    def _next(self) -> tuple[ModelState, WindowRows]:
        """The model that the next update starts with, and its rows."""
        state = restore_or_create(self.config, self.spec)
        log = ClickLog.open_or_create(self.config.log_path, self.spec)
        window = next_window(log, state.cursor, self.config.window, datetime.now(UTC))
        assert window is not None
        return state, load_rows(log, window, state, self.spec, self.config)

    def _with_rates(self, factor: float) -> UpdateConfig:
        names = ("dense_learning_rate", "sparse_learning_rate", "wide_learning_rate")
        rates = {name: factor * getattr(self.config.training, name) for name in names}
        return self.config.model_copy(update={"training": self.config.training.model_copy(update=rates)})

    def _judged(self, rows: WindowRows, champion_H: F32, challenger_H: F32) -> GateVerdict:
        held = rows.held_out
        pair = Paired(
            labels_H=rows.encoded.labels_R[held],
            champion_H=champion_H,
            challenger_H=challenger_H,
            weights_H=rows.judged_weights_R[held],
            user_H=rows.examples.user_R[held],
        )
        gains = past_gains(read_history(self.config.model_dir), before=rows.seed[-1])
        return judge(
            pair, limits=self.config.gate.limits(), windows=1, past_gains=gains, skipped_steps=0, steps=1, seed=[self.drawn]
        )


def _learned(
    config: UpdateConfig, spec: DatasetSpec, state: ModelState, rows: WindowRows, kept: np.ndarray | None = None
) -> F32:
    """What the state predicts of the held-out rows, once it has learned the others."""
    kept_R = np.ones(rows.encoded.num_rows, bool) if kept is None else kept.copy()
    kept_R[rows.held_out] = False
    encoded, _ = admit_ids(
        state, rows.examples, rows.encoded, spec, hour=rows.seed[-1] - 1, counted_rows=np.flatnonzero(kept_R)
    )
    learner = state.learner
    policy = batch_policy(config.training, fit=StepTimeFit(), noise=learner.noise_scale)
    learn(learner, encoded, seed=rows.seed, policy=policy, kept_R=kept_R)
    return predicted(state, encoded, rows.held_out)


def _shuffled(rows: WindowRows, rng: np.random.Generator) -> WindowRows:
    """Of the rows that are learned; those held out keep theirs."""
    labels, learned = rows.encoded.labels_R.copy(), np.setdiff1d(np.arange(rows.encoded.num_rows), rows.held_out)
    labels[learned] = labels[rng.permutation(learned)]
    return replace(rows, encoded=replace(rows.encoded, labels_R=labels))


def _leaking(rows: WindowRows, rng: np.random.Generator) -> WindowRows:
    """The first number is the label, in the units that numbers have, with a hundredth of noise."""
    dense = rows.encoded.dense_RN.copy()
    dense[:, 0] = 2 * rows.encoded.labels_R - 1 + 0.01 * rng.normal(size=len(dense))
    return replace(rows, encoded=replace(rows.encoded, dense_RN=dense))


def _as_it_is(rows: WindowRows, rng: np.random.Generator) -> WindowRows:
    return rows


BROKEN: dict[str, tuple[Alter, float]] = {
    "shuffled labels": (_shuffled, 1.0),
    "ten times the rates": (_as_it_is, 10.0),
    "label leak": (_leaking, 1.0),
}


def _print(found: dict[str, list[GateVerdict]], shares: Sequence[float]) -> None:
    table = Table("model", "judged", "rejected", "held", "published", "rejected for")
    for name, verdicts in found.items():
        counts = Counter(verdict.decision for verdict in verdicts)
        reasons = Counter(figure.name for verdict in verdicts for figure in verdict.figures[:-1] if not figure.passed)
        why = ", ".join(f"{figure} {count}" for figure, count in reasons.most_common())
        row = (len(verdicts), counts["reject"], counts["hold"], counts["publish"])
        table.add_row(name, *map(str, row), why)
    console, same = Console(width=120), found["as good"]
    console.print(table)
    for name, intervals in (
        ("the bootstrap of users", [verdict.auc_interval for verdict in same]),
        ("DeLong's formula", [verdict.delong_interval for verdict in same]),
    ):
        out = sum(interval is not None and (interval.low > 0 or interval.high < 0) for interval in intervals)
        console.print(f"as good, 0 is outside of the 95 % interval by {name}: {out} of {len(intervals)}")
    rows = np.mean([verdict.rows for verdict in same])
    users = np.mean([verdict.users for verdict in same])
    console.print(f"held-out rows {rows:,.0f}, users {users:,.0f}, in the mean")
    later = shares[FIRST_HOURS:]
    console.print(f"the gate took {np.mean(later):.1%} of an update's seconds (at most {max(later):.1%})")


if __name__ == "__main__":
    main()
