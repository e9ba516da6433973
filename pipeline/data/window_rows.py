"""A window's rows, read and encoded: what is evaluated and learned.

Enters: a `Window` and the model's memory. Leaves: `WindowRows`, drawn negatives included.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32, I64, U64, Examples, concatenate
from models.id_table import IdFigures
from pipeline.config import UpdateConfig
from pipeline.data.clicks import as_corrections, is_correction
from pipeline.data.encode import EncodedWindow, encode
from pipeline.data.lake import ClickLog, RowRange
from pipeline.data.lineage import Mask, Piece
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.data.negatives import with_negatives
from pipeline.data.shares import SAMPLE_ROWS, raw_sample, read_examples
from pipeline.data.windows import Window
from pipeline.evaluation.paired import held_out
from pipeline.evaluation.score import probabilities
from pipeline.model_state import ModelState
from pipeline.training.late_clicks import Looks
from pipeline.training.processes import Processes
from pipeline.training.sampling import SampledWindow


@dataclass(frozen=True, kw_only=True)
class WindowRows:
    """A window's rows in both forms, and those that are evaluated."""

    examples: Examples
    """Those of the click log, then negatives that were drawn, where the log has none."""
    encoded: EncodedWindow
    event_keys: U64 | None
    """Of the rows of the click log, where clicks are events of their own."""
    num_logged: int
    """Rows of the click log, corrections among them: what is counted, remembered and consumed."""
    judged_weights_R: F32
    """Of the rows where they are evaluated."""
    evaluated: I64
    """Rows that are new to the model, in a random order, so that any prefix is a uniform sample of them.

    Rows that an earlier window did not reach are left out: counters know what happened around them by now.
    """
    held_out: I64
    """Rows of the click log that are new to the model, are not learned now, and judge it."""
    judged: bool
    """Whether the model is compared with the one before; not, where there is none, or where a person wants the window
    learned."""
    seed: tuple[int, ...]
    sample: pd.DataFrame
    """The first rows as they stand in the click log."""
    ids: Mapping[str, IdFigures] = field(default_factory=dict)
    """What the window did to admitted ids, once it was counted."""
    notes: tuple[str, ...] = ()
    """What was drawn."""
    learned: SampledWindow | None = None
    """As the rows were learned."""
    looks: Looks = field(default_factory=Looks)
    """At past impressions, behind those rows."""
    moved_R: F32 | None = None
    """What learning the window moved the logits of the rows by, where clicks are events of their own."""

    @property
    def clicks_known_share(self) -> float:
        """Share of the clicks of the evaluated rows that is known yet, by estimate."""
        return float(np.mean(self.encoded.known_share(self.evaluated))) if len(self.evaluated) else 1.0


def load_rows(click_log: ClickLog, window: Window, state: ModelState, spec: DatasetSpec, config: UpdateConfig) -> WindowRows:
    """The window's rows; numbers are normalised by what was seen before it, or by itself if nothing was."""
    examples, sample, event_keys = _logged(click_log, window, spec, state.learner.processes)
    seed = (state.learner.config.seed, window.end)

    def encoded(examples: Examples) -> EncodedWindow:
        return encode(examples, spec, state.memory, state.moments, hour=window.start, ids=state.ids)

    drawn = with_negatives(
        examples,
        spec,
        config.sampling,
        seed=[*seed, 2],
        scores=lambda candidates: _scores(state, encoded(candidates)),
        before=_trailing_rows(click_log, window, spec, config.sampling.negatives_trailing_hours, state.learner.processes),
    )
    examples = drawn.examples
    shown_R = ~is_correction(examples.labels_R)
    held_out = _held_out(examples, window, state, config, seed=seed) & shown_R
    new = np.flatnonzero((examples.hour_R >= window.start) & shown_R)
    if window.clicks is None or event_keys is None:
        window_encoded = encoded(examples)
    else:
        known = state.late_clicks
        window_encoded = known.encoded(examples, event_keys, window.clicks, encoded, spec, state.ids, hour=window.start)
    return WindowRows(
        examples=examples,
        event_keys=event_keys,
        encoded=replace(window_encoded, logit_shifts_R=drawn.shift_R),
        num_logged=drawn.num_logged,
        judged_weights_R=examples.weights_R if drawn.judged_weights_R is None else drawn.judged_weights_R,
        evaluated=np.random.default_rng([*seed, 1]).permutation(new),
        held_out=np.flatnonzero(held_out),
        judged=_is_judged(window, state, config),
        seed=seed,
        sample=sample,
        notes=(
            *_gate_notes(config),
            *drawn.notes,
            *_click_notes(window, state, None if event_keys is None else event_keys[~shown_R]),
        ),
    )


def sample_of(click_log: ClickLog, spec: DatasetSpec, start: int, end: int) -> tuple[Examples, pd.DataFrame]:
    """A few rows of the hours from `start` to before `end`, since 1970, as examples and as a caller would send them."""
    columns = columns_to_read(spec)
    read = columns if spec.clicks is None else [*columns, "is_click"]
    ranges = [RowRange(file=f, start=0, stop=min(f.num_rows, 1000)) for f in click_log.files() if start <= f.hour < end]
    table = click_log.read(ranges[:1], read)
    if spec.clicks is not None:
        table = table.filter(pc.invert(table["is_click"])).select(columns)
    table = table.slice(0, SAMPLE_ROWS)
    return to_examples(table, spec), raw_sample(table)


def _gate_notes(config: UpdateConfig) -> Iterator[str]:
    if config.gate.action != "off" and config.sampling.negatives != "none":
        yield "the gate judges no model whose negatives are drawn (docs/gate.md); set gate.action = 'off' to be told no more"


def _held_out(examples: Examples, window: Window, state: ModelState, config: UpdateConfig, *, seed: Sequence[int]) -> Mask:
    if not _is_judged(window, state, config):
        return np.zeros(examples.num_rows, bool)
    chosen = held_out(examples.user_R, share=config.gate.holdout_share, salt=seed)
    return chosen & (examples.hour_R >= window.start)


def _is_judged(window: Window, state: ModelState, config: UpdateConfig) -> bool:
    asked = config.gate.action != "off" and config.sampling.negatives == "none"
    return asked and state.version > 0 and not window.released


def _logged(
    click_log: ClickLog, window: Window, spec: DatasetSpec, processes: Processes
) -> tuple[Examples, pd.DataFrame, U64 | None]:
    """Examples of the rows that stand in the log, corrections behind the others; a few of the rows as they stand there; and the
    events of the examples, where clicks are events of their own."""
    own = read_examples(click_log, window.pieces, spec, processes)
    if window.clicks is None or own.event_keys is None:
        return own.examples, own.sample, None
    examples = replace(own.examples, labels_R=window.clicks.clicked_I.astype(np.float32))
    if not window.clicks.num_corrections:
        return examples, own.sample, own.event_keys
    corrected = read_examples(click_log, window.clicks.corrected, spec, processes)
    assert corrected.event_keys is not None
    keys = np.concatenate([own.event_keys, corrected.event_keys])
    return concatenate([examples, as_corrections(corrected.examples)]), own.sample, keys


def _click_notes(window: Window, state: ModelState, late_keys: U64 | None) -> Iterator[str]:
    clicks = window.clicks
    if clicks and clicks.num_corrections:
        yield f"{clicks.num_corrections:,} clicks came after their impressions had been learned, and correct them"
    if late_keys is not None and (num_unknown := state.late_clicks.num_unknown(late_keys)):
        yield (
            f"of these {num_unknown:,} are counted, but not learned: what was known of their impressions is not kept any more, "
            "since the click arrived more than an hour after clicks.attribution_minutes, or the features have changed"
        )
    if clicks and clicks.waiting:
        yield f"{clicks.waiting:,} clicks wait for their impressions"
    if clicks and clicks.unattributed:
        yield f"{clicks.unattributed:,} clicks belong to no impression within clicks.attribution_minutes, and are left out"


def _trailing_rows(
    click_log: ClickLog, window: Window, spec: DatasetSpec, trailing_hours: int, processes: Processes
) -> Examples | None:
    """Rows of the hours before the window, where the settings let negatives come from them."""
    if not trailing_hours:
        return None
    files = [file for file in click_log.files(window.log_version) if window.start - trailing_hours <= file.hour < window.start]
    if not files:
        return None
    return read_examples(click_log, [Piece(file=file) for file in files], spec, processes).examples


def _scores(state: ModelState, encoded: EncodedWindow) -> F32:
    learner = state.learner
    weights = learner.dense_weights(averaged=True)
    return probabilities(learner.model, weights, encoded, device=learner.device, processes=learner.processes)
