"""Thinned negatives and stratified batches, hourly test-then-train beside the model that learned every row in plain order."""

from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t
from sklearn.metrics import log_loss, roc_auc_score

from data_schemas.examples import F32
from pipeline.config import SamplingConfig
from sampled.streams import Model, hours_of, mean_and_range, synthetic_spec

WARMUP_HOURS = 4
ALL_ROWS, ANOTHER_ORDER = "all rows", "all rows, in another order"
OTHER_SEED = 1000
THINNED = {
    f"keep {rate}, {correction}": SamplingConfig(negative_keep_rate=rate, correction=correction)
    for rate in (0.25, 0.1)
    for correction in ("weights", "logit_shift")
} | {
    f"keep {rate}, weights, batches by label": SamplingConfig(
        negative_keep_rate=rate, strata=("label",), stratified_batches=True
    )
    for rate in (0.25, 0.1)
}
WEIGHTED = {f"keep {rate}, weights": SamplingConfig(negative_keep_rate=rate) for rate in (0.25, 0.1)}
STRATIFIED = {
    "batches by label": SamplingConfig(strata=("label",), stratified_batches=True),
    "batches by label and popularity": SamplingConfig(strata=("label", "item_popularity"), stratified_batches=True),
}


@dataclass
class Judged:
    """One model on one seed."""

    predictions: list[F32] = field(default_factory=list)
    rows_learned: int = 0
    learning_seconds: float = 0.0
    sampling_seconds: float = 0.0


def run(ctr: float, hours: int, rows: int, seeds: int) -> None:
    """Keep rates .25 and .1, with weights and with the logit shift."""
    _compare(f"thinned negatives at a base CTR of {ctr:g}", THINNED, ctr, hours, rows, seeds)


def run_strata(ctr: float, hours: int, rows: int, seeds: int) -> None:
    """Every row learned, in stratified batches."""
    _compare(f"stratified batches at a base CTR of {ctr:g}", STRATIFIED, ctr, hours, rows, seeds)


def run_calibration(ctr: float, hours: int, rows: int, seeds: int) -> None:
    """COPC of models of thinned rows over that of the model of all rows, with an interval over seeds; and, to compare, of a
    second model of all rows, with the same first weights, that learned them in another order.

    A line a seed, so that a run that is cut short has told something.
    """
    logs: dict[str, list[float]] = {name: [] for name in (ANOTHER_ORDER, *WEIGHTED)}
    clicks = 0
    for seed in range(seeds):
        labels_R, judged = _one_seed({ALL_ROWS: SamplingConfig()} | WEIGHTED, ctr, hours, rows, seed, another_order=True)
        clicks += int(labels_R.sum())
        predicted = {name: np.concatenate(model.predictions).sum(dtype=np.float64) for name, model in judged.items()}
        for name, of_seeds in logs.items():
            of_seeds.append(float(np.log(predicted[ALL_ROWS] / predicted[name])))
        figures = ", ".join(f"{name}: {np.exp(of_seeds[-1]):.3f}" for name, of_seeds in logs.items())
        print(
            f"seed {seed}: {labels_R.sum():,.0f} clicks, COPC {labels_R.sum() / predicted[ALL_ROWS]:.3f}, ratio {figures}",
            flush=True,
        )
    table = Table(title=f"COPC ratio at a base CTR of {ctr:g}: {seeds} seeds, {clicks:,} clicks judged in all")
    for head in ("", "mean", "95 % interval", "sd of a seed"):
        table.add_column(head, justify="right" if head else "left")
    for name, of_seeds in logs.items():
        mean, sd = np.mean(of_seeds), np.std(of_seeds, ddof=1)
        half = student_t.ppf(0.975, seeds - 1) * sd / np.sqrt(seeds)
        interval = f"{np.exp(mean - half):.3f} to {np.exp(mean + half):.3f}"
        table.add_row(name, f"{np.exp(mean):.3f}", interval, f"{sd:.3f}")
    Console(width=120).print(table)


def _compare(title: str, samplings: dict[str, SamplingConfig], ctr: float, hours: int, rows: int, seeds: int) -> None:
    samplings = {ALL_ROWS: SamplingConfig()} | samplings
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in samplings}
    clicks = 0
    for seed in range(seeds):
        labels_R, judged = _one_seed(samplings, ctr, hours, rows, seed)
        clicks += int(labels_R.sum())
        reference = judged[ALL_ROWS]
        for name, model in judged.items():
            results[name].append(_figures(labels_R, model, reference))
    heads = ("rows learned", "CPU time", "sampling / CPU time", "log loss", "change", "AUC change", "COPC", "COPC ratio")
    table = Table(title=f"{title}: {seeds} seeds, {clicks:,} clicks judged in all")
    for head in ("", *heads):
        table.add_column(head, justify="right" if head else "left")
    for name, figures in results.items():
        columns = [list(column) for column in zip(*figures, strict=True)]
        digits = (3, 3, 4, 5, 5, 4, 3, 4)
        table.add_row(name, *(mean_and_range(column, d) for column, d in zip(columns, digits, strict=True)))
    Console(width=250).print(table)


def _one_seed(
    samplings: dict[str, SamplingConfig], ctr: float, hours: int, rows: int, seed: int, *, another_order: bool = False
) -> tuple[F32, dict[str, Judged]]:
    spec = synthetic_spec()
    models = {name: Model(spec, sampling, seed) for name, sampling in samplings.items()}
    if another_order:
        models[ANOTHER_ORDER] = Model(spec, SamplingConfig(), seed)
        models[ANOTHER_ORDER].seed = seed + OTHER_SEED
    judged = {name: Judged() for name in models}
    labels = []
    for number, hour in enumerate(hours_of(spec, ctr=ctr, hours=hours, rows=rows, seed=seed)):
        if number >= WARMUP_HOURS:
            labels.append(hour.window.labels_R)
        for name, model in models.items():
            if number >= WARMUP_HOURS:
                judged[name].predictions.append(model.predict(hour.window))
            model.learn(hour)
    for name, model in models.items():
        judged[name].rows_learned = model.rows_learned
        judged[name].learning_seconds = model.learning_seconds
        judged[name].sampling_seconds = model.sampling_seconds
    return np.concatenate(labels), judged


def _figures(labels_R: F32, model: Judged, reference: Judged) -> tuple[float, ...]:
    predicted_R, at_best_R = (np.concatenate(m.predictions).astype(np.float64) for m in (model, reference))
    seconds = model.learning_seconds + model.sampling_seconds
    loss, best = log_loss(labels_R, predicted_R), log_loss(labels_R, at_best_R)
    return (
        model.rows_learned / reference.rows_learned,
        seconds / (reference.learning_seconds + reference.sampling_seconds),
        model.sampling_seconds / seconds,
        loss,
        loss - best,
        roc_auc_score(labels_R, predicted_R) - roc_auc_score(labels_R, at_best_R),
        labels_R.sum() / predicted_R.sum(),
        at_best_R.sum() / predicted_R.sum(),
    )
