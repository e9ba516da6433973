"""The step of the table rows where something is done to each row's gradient first: clipping, averaging.

    gradient of the pooled embeddings -> gradient of each row -> CowClip -> moving average -> the tables' optimizer

Without any of it the tables do the whole in one backward pass, and nothing here runs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from data_schemas.errors import ConfigError
from data_schemas.examples import I64
from models.embeddings import EmbeddingTables, TableSlice
from models.row_gradients import Lookups, RowGradients, row_gradients, step_rows
from pipeline.config import TrainingConfig
from pipeline.training.cowclip import clip_by_count
from pipeline.training.processes import Processes
from pipeline.training.smoothing import RowGradientAverage, RowWeightAverage


class SparseStep:
    """Steps table rows, and keeps what that needs from one step to the next."""

    def __init__(self, tables: EmbeddingTables, config: TrainingConfig, processes: Processes) -> None:
        asked = [name for name in ("cowclip", "sparse_gradient_ema", "sparse_weight_ema") if getattr(config, name)]
        if asked and processes.count > 1:
            raise ConfigError(
                f"training.{asked[0]} needs the whole gradient of a row in one process, and there are {processes.count}; train "
                "in one process, or turn the setting off"
            )
        self.needed = bool(asked)
        """False: the fused backward does it all."""
        self._tables = tables
        self._config = config
        self._weights = {of.name: of.tensor for of in tables.slices(with_optimizer=False)} if asked else {}
        beta, weight_beta = config.sparse_gradient_ema, config.sparse_weight_ema
        self.gradient_average = RowGradientAverage(self._weights, beta) if beta else None
        self.weight_average = RowWeightAverage(self._weights, weight_beta) if weight_beta else None
        self.rows_stepped = 0
        """Of the embeddings, rows of all steps; a row that three steps touch counts three times."""
        self.rows_clipped = 0

    def learn(self, *lookups: Lookups) -> None:
        """One step of every row that a learned example looked up."""
        gradients = [self._clipped(of) for part in lookups for of in row_gradients(part)]
        if not gradients:
            return
        smoothed = self.gradient_average.smooth(gradients) if self.gradient_average else gradients
        with self.weight_average.around_step(smoothed) if self.weight_average else nullcontext():
            step_rows(self._tables, smoothed)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The tables hold the averages of their rows inside, where averages are kept."""
        with self.weight_average.in_place() if self.weight_average else nullcontext():
            yield

    def forget(self, rows_by_feature: Mapping[str, I64]) -> None:
        """Rows of each feature's tables have a new owner."""
        for average in self.averages().values():
            for name, weight in self._weights.items():
                feature = name.split(".", 1)[1].removesuffix(".weight")
                if feature in rows_by_feature:
                    average.forget(name, torch.from_numpy(rows_by_feature[feature]).to(weight.device))

    def averages(self) -> dict[str, RowGradientAverage | RowWeightAverage]:
        """Those that are kept, by their names in a checkpoint."""
        both = {"row_gradient_average": self.gradient_average, "row_weight_average": self.weight_average}
        return {kind: average for kind, average in both.items() if average is not None}

    def slices(self) -> Iterator[TableSlice]:
        """Every rectangle of the averages, beside those of the tables; the live storage."""
        for kind, of_rows in self.averages().items():
            for name, tensor in of_rows.tensors().items():
                matrix = tensor.unsqueeze(1) if tensor.dim() == 1 else tensor
                yield TableSlice(name=f"{kind}.{name}", row=0, column=0, tensor=matrix)

    def notes(self) -> tuple[str, ...]:
        """What was done to gradients, in words."""
        if not self._config.cowclip or not self.rows_stepped:
            return ()
        share = self.rows_clipped / self.rows_stepped
        return (f"CowClip shortened {share:.2%} of the {self.rows_stepped:,} gradients of embedding rows",)

    def _clipped(self, of: RowGradients) -> RowGradients:
        if not self._config.cowclip or of.part == "wide":
            return of
        clipped_UD, count = clip_by_count(
            of.gradient_UD,
            self._weights[of.name][of.rows_U],
            of.count_U,
            ratio=self._config.cowclip_ratio,
            least=self._config.cowclip_least,
        )
        self.rows_stepped += len(of.rows_U)
        self.rows_clipped += count
        return replace(of, gradient_UD=clipped_UD)
