"""A window of clicks only, with negatives drawn beside them: what `run_update` encodes, evaluates and learns.

Enters: the examples of a window. Leaves: the same rows first, then the drawn ones. Only the first are counted and remembered.

Letters: R rows, logged and drawn; L logged rows; D drawn rows; C candidates a click.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_schemas.dataset import DatasetSpec
from data_schemas.errors import ConfigError
from data_schemas.examples import F32, I64, Examples, IdLists, concatenate
from pipeline.config import SamplingConfig
from sampling.negatives import Drawn, Law, choose_hard, draw_negatives

Scores = Callable[[Examples], F32]
"""The model's own score of each row, before the window is learned."""


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """A window's rows with what was drawn."""

    examples: Examples
    """`[R]` the logged rows, then the drawn ones, click after click."""
    num_logged: int
    """L."""
    judged_weights_R: F32 | None = None
    """Weights that stand for the law of exposure, where the examples' own do not: with `logq`. None: they do."""
    shift_R: F32 | None = None
    """Added to the logits while learning; None: nothing."""
    notes: tuple[str, ...] = field(default=())
    """What was drawn, and for what nothing could be."""


def require_sampler(spec: DatasetSpec, sampling: SamplingConfig) -> None:
    """Refuses a log that has no negatives and gets none, and one that has its own and would get more.

    Raises:
        ConfigError: names the setting.
    """
    if spec.has_labels and sampling.negatives != "none":
        raise ConfigError(
            f"sampling.negatives is {sampling.negatives!r}, but data set {spec.name!r} has a label, and so negatives of its "
            "own; set it to 'none'"
        )
    if spec.has_labels:
        return
    if sampling.negatives == "none":
        raise ConfigError(
            f"data set {spec.name!r} has no [label]: its log holds clicks only, and sampling.negatives is 'none', so there is "
            "nothing to tell clicks from; set it to 'popularity', 'uniform', 'in_batch' or 'hard'"
        )
    for role in ("user", "item"):
        if getattr(spec, role) is None:
            raise ConfigError(
                f"sampling.negatives is {sampling.negatives!r}, but data set {spec.name!r} declares no {role!r}: negatives are "
                f"other items for the same user; set {role!r} in its TOML"
            )


def with_negatives(
    clicks: Examples,
    spec: DatasetSpec,
    sampling: SamplingConfig,
    *,
    seed: Sequence[int],
    scores: Scores,
    before: Examples | None = None,
) -> Negatives:
    """The window's clicks and the negatives that the settings ask for; a log with a label as it is.

    Args:
        clicks: all rows of the window.
        seed: the same gives the same rows.
        scores: asked with `hard` alone.
        before: rows of the trailing hours, where `negatives_trailing_hours` asks for them.
    """
    if sampling.negatives == "none":
        return Negatives(examples=clicks, num_logged=clicks.num_rows)
    known = clicks if before is None else concatenate([clicks, before])
    hard = sampling.negatives == "hard"
    drawn = draw_negatives(
        known.user_R,
        known.item_R,
        known.hour_R,
        law=_law(sampling),
        draws_a_click=sampling.hard_candidates if hard else sampling.negatives_per_positive,
        power=sampling.popularity_power,
        seed=seed,
        num_clicks=clicks.num_rows,
        trailing_hours=sampling.negatives_trailing_hours,
        in_batch_clicks=sampling.in_batch_clicks,
    )
    rows = drawn_examples(known, drawn, spec)
    if hard:
        rows, ratio_D, left = _hardest(rows, drawn, sampling, [*seed, 1], scores)
    else:
        ratio_D, left = drawn.ratio_D.astype(np.float32), drawn.undrawn
    notes = _notes(drawn, rows.num_rows, left, sampling)
    return _corrected(clicks, rows, ratio_D, drawn.click_ratio_R[: clicks.num_rows].astype(np.float32), sampling, notes)


def drawn_examples(known: Examples, drawn: Drawn, spec: DatasetSpec) -> Examples:
    """The drawn rows: the item and its features from its own row, all else from the click, label 0."""
    beside, other = known.take(drawn.click_D), known.take(drawn.item_D)
    own = {spec.item, *spec.item_features}
    numbers_N = np.array([number.name in own for number in spec.numeric], bool)
    lists: dict[str, IdLists] = {name: (other if name in own else beside).list_ids[name] for name in beside.list_ids}
    return replace(
        beside,
        single_ids={name: (other if name in own else beside).single_ids[name] for name in beside.single_ids},
        list_ids=lists,
        numeric_NR=np.where(numbers_N[:, None], other.numeric_NR, beside.numeric_NR),
        item_R=other.item_R,
        labels_R=np.zeros(beside.num_rows, np.float32),
    )


def _law(sampling: SamplingConfig) -> Law:
    match sampling.negatives:
        case "uniform" | "in_batch" as law:
            return law
        case "popularity" | "hard":
            return "popularity"
        case "none":
            raise AssertionError("nothing is drawn")


def _hardest(
    candidates: Examples, drawn: Drawn, sampling: SamplingConfig, seed: Sequence[int], scores: Scores
) -> tuple[Examples, F32, int]:
    """The model's own top of each click's candidates and some of the others, their weights, and draws that were lost."""
    chosen, size = sampling.negatives_per_positive, sampling.hard_candidates
    whole = np.flatnonzero((np.bincount(drawn.click_D) == size)[drawn.click_D]) if len(drawn.click_D) else np.empty(0, np.int64)
    rows_RC: I64 = whole.reshape(-1, size)
    if not len(rows_RC):
        return candidates.take(whole), np.empty(0, np.float32), drawn.undrawn
    scored_RC = scores(candidates)[rows_RC]
    hard = min(round(sampling.hard_share * chosen), chosen - 1)
    positions, weights = choose_hard(scored_RC, chosen=chosen, hard=hard, seed=seed)
    rows = np.take_along_axis(rows_RC, positions, axis=1).reshape(-1)
    lost = len(np.unique(drawn.click_D)) - len(rows_RC)
    return candidates.take(rows), weights.reshape(-1).astype(np.float32), lost * chosen


def _corrected(
    clicks: Examples, rows: Examples, ratio_D: F32, click_ratio_L: F32, sampling: SamplingConfig, notes: tuple[str, ...]
) -> Negatives:
    num_logged = clicks.num_rows
    match sampling.negative_correction:
        case "none":
            return Negatives(examples=concatenate([clicks, rows]), num_logged=num_logged, notes=notes)
        case "weights":
            rows = rows.with_weights(rows.weights_R * ratio_D)
            return Negatives(examples=concatenate([clicks, rows]), num_logged=num_logged, notes=notes)
        case "logq":
            return Negatives(
                examples=concatenate([clicks, rows]),
                num_logged=num_logged,
                judged_weights_R=np.concatenate([clicks.weights_R, rows.weights_R * ratio_D]),
                shift_R=np.log(np.concatenate([click_ratio_L, ratio_D])),
                notes=notes,
            )


def _notes(drawn: Drawn, num_drawn: int, left: int, sampling: SamplingConfig) -> tuple[str, ...]:
    live = "in the same hour"
    if sampling.negatives_trailing_hours:
        live = f"up to {sampling.negatives_trailing_hours} hours before, which gives them away by their age"
    notes = [f"drew {num_drawn:,} negatives ({sampling.negatives}) from {drawn.live_pairs:,} items that were live {live}"]
    if drawn.clicks_without:
        notes.append(f"{drawn.clicks_without:,} clicks got no negatives: no item, or their users clicked all that was live")
    if left:
        notes.append(f"{left:,} draws were given up: they met only items that their users clicked")
    return tuple(notes)
