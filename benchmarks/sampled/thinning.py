"""Thinned negatives and stratified batches, hourly test-then-train beside the model that learned every row in plain order."""

from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.metrics import log_loss, roc_auc_score

from data_schemas.examples import F32
from pipeline.config import SamplingConfig
from sampled.streams import Model, hours_of, mean_and_range, synthetic_spec

WARMUP_HOURS = 4
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


def _compare(title: str, samplings: dict[str, SamplingConfig], ctr: float, hours: int, rows: int, seeds: int) -> None:
    samplings = {"all rows": SamplingConfig()} | samplings
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in samplings}
    clicks = 0
    for seed in range(seeds):
        labels_R, judged = _one_seed(samplings, ctr, hours, rows, seed)
        clicks += int(labels_R.sum())
        reference = judged["all rows"]
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
    samplings: dict[str, SamplingConfig], ctr: float, hours: int, rows: int, seed: int
) -> tuple[F32, dict[str, Judged]]:
    spec = synthetic_spec()
    models = {name: Model(spec, sampling, seed) for name, sampling in samplings.items()}
    judged = {name: Judged() for name in samplings}
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
