"""Moving averages of gradients and of weights, dense and of table rows.

Enters: gradients or weights after each step. Leaves: their exponential moving averages; those that start from zero are
corrected for it (Kingma & Ba 2015, algorithm 1). Averages of weights: Polyak & Juditsky 1992, in exponential form.

Letters: U distinct rows of a table that a step touches, D length of an embedding.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from models.row_gradients import RowGradients


class MovingAverage:
    """The bias-corrected exponential moving average of some tensors.

    `average = (1 - decay) * sum(decay^(t-i) * x_i) / (1 - decay^t)`.
    """

    def __init__(self, shapes_like: Mapping[str, torch.Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.steps = 0.0
        self.sums = {name: torch.zeros_like(tensor) for name, tensor in shapes_like.items()}

    @torch.no_grad()
    def add(self, values: Mapping[str, torch.Tensor], *, steps: float = 1.0) -> None:
        """Counts one more observation in, that stands for so many `steps`.

        A batch of k times the reference stands for k of its steps, with `decay^k` (Busbridge et al. 2023, *How to Scale Your
        EMA*): the average then remembers as many rows, whatever the batches that they come in.
        """
        self.steps += steps
        torch._foreach_lerp_(list(self.sums.values()), [values[name] for name in self.sums], 1 - self.decay**steps)

    def averages(self) -> dict[str, torch.Tensor]:
        """The averages so far; at least one observation is needed."""
        assert self.steps > 0
        correction = 1 - self.decay**self.steps
        return {name: total / correction for name, total in self.sums.items()}

    def load(self, sums: Mapping[str, torch.Tensor], steps: float) -> None:
        """Goes on from saved sums."""
        self.steps = steps
        for name, total in self.sums.items():
            total.copy_(sums[name])


def smooth_gradients(parameters: Iterable[tuple[str, torch.nn.Parameter]], average: MovingAverage) -> None:
    """Puts each parameter's smoothed gradient in the place of its gradient."""
    named = {name: parameter for name, parameter in parameters if parameter.grad is not None}
    average.add({name: parameter.grad for name, parameter in named.items() if parameter.grad is not None})
    for name, smoothed in average.averages().items():
        named[name].grad = smoothed


class RowGradientAverage:
    """The bias-corrected moving average of the gradients of table rows, brought up to date when a row is touched.

    A row that no example touches in a step has gradient zero there, so that its average only decays: `decay^n` for `n` steps
    at once gives what an average over the whole table would hold. Only touched rows step.

    Takes as much memory as the tables, and four bytes a row.
    """

    def __init__(self, tables: Mapping[str, torch.Tensor], decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.sums = {name: torch.zeros_like(weight) for name, weight in tables.items()}
        self.touched = _never_touched(tables)

    @torch.no_grad()
    def smooth(self, gradients: Sequence[RowGradients]) -> list[RowGradients]:
        """Counts one more step in; the averaged gradients of the rows that it touches."""
        self.steps += 1
        return [self._smooth(of) for of in gradients]

    def _smooth(self, of: RowGradients) -> RowGradients:
        sums, touched, rows = self.sums[of.name], self.touched[of.name], of.rows_U
        faded_U = _decayed(self.decay, self.steps - touched[rows])
        sums[rows] = sums[rows] * faded_U[:, None] + (1 - self.decay) * of.gradient_UD
        touched[rows] = self.steps
        return replace(of, gradient_UD=sums[rows] / (1 - self.decay**self.steps))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps, beside `steps`."""
        return _named(sum=self.sums, touched=self.touched)

    def load(self, saved: Mapping[str, torch.Tensor], steps: int) -> None:
        """Goes on from saved tensors; a table that is not among them starts anew."""
        self.steps = steps
        _fill(saved, sum=self.sums, touched=self.touched)

    def forget(self, table: str, rows: torch.Tensor) -> None:
        """Rows with a new owner have no past."""
        self.sums[table][rows] = 0.0


class RowWeightAverage:
    """The moving average of table rows, `average = decay * average + (1 - decay) * w` after each step, from the first weight.

    Kept as the deviation of the average from the weight: a row that is not touched does not move, so that its deviation
    decays by `decay` a step, many steps at once. A step costs what the rows that it touches cost.

    Takes as much memory as the tables, and four bytes a row.
    """

    def __init__(self, tables: Mapping[str, torch.Tensor], decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.tables = dict(tables)
        """The live weights."""
        self.deviations = {name: torch.zeros_like(weight) for name, weight in tables.items()}
        self.touched = _never_touched(tables)

    @contextmanager
    def around_step(self, gradients: Sequence[RowGradients]) -> Iterator[None]:
        """Counts the step in that is done inside."""
        before = {of.name: self.tables[of.name][of.rows_U] for of in gradients}
        yield
        self.steps += 1
        with torch.no_grad():
            for of in gradients:
                rows, touched = of.rows_U, self.touched[of.name]
                faded_U = _decayed(self.decay, self.steps - 1 - touched[rows])
                average_UD = before[of.name] + faded_U[:, None] * self.deviations[of.name][rows]
                self.deviations[of.name][rows] = self.decay * (average_UD - self.tables[of.name][rows])
                touched[rows] = self.steps

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The tables hold the averages inside; after it, the weights as they were to the last bit.

        Rows whose deviation has decayed below 2^-30 of what it was are left alone: it is beyond the precision of a weight.
        """
        horizon = math.ceil(30 * math.log(2) / -math.log(self.decay))
        kept = []
        with torch.no_grad():
            for name, weight in self.tables.items():
                touched = self.touched[name]
                rows = torch.nonzero((touched > 0) & (touched > self.steps - horizon)).squeeze(1)
                kept.append((weight, rows, weight[rows]))
                weight[rows] += _decayed(self.decay, self.steps - touched[rows])[:, None] * self.deviations[name][rows]
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, rows, own_UD in kept:
                    weight[rows] = own_UD

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps, beside `steps`."""
        return _named(deviation=self.deviations, touched=self.touched)

    def load(self, saved: Mapping[str, torch.Tensor], steps: int) -> None:
        """Goes on from saved tensors; a table that is not among them starts anew."""
        self.steps = steps
        _fill(saved, deviation=self.deviations, touched=self.touched)

    def forget(self, table: str, rows: torch.Tensor) -> None:
        """Rows with a new owner have no past: their average is their weight."""
        self.deviations[table][rows] = 0.0


def _never_touched(tables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The step that last touched each row: 0 for none."""
    return {name: torch.zeros(len(weight), dtype=torch.int32, device=weight.device) for name, weight in tables.items()}


def _decayed(decay: float, steps_U: torch.Tensor) -> torch.Tensor:
    return torch.pow(torch.tensor(decay, dtype=torch.float64, device=steps_U.device), steps_U).float()


def _named(**groups: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.{kind}": tensor for kind, group in groups.items() for name, tensor in group.items()}


def _fill(saved: Mapping[str, torch.Tensor], **groups: Mapping[str, torch.Tensor]) -> None:
    for kind, group in groups.items():
        for name, tensor in group.items():
            if f"{name}.{kind}" in saved:
                tensor.copy_(saved[f"{name}.{kind}"])
