"""Strategies: their names, their windows, and what a table says of their runs."""

import csv
import io
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data_schemas.dataset import load_spec
from data_schemas.errors import ConfigError, LearningDiverged
from pipeline.comparison import run as running
from pipeline.comparison.run import ProbePoint, Probing, StrategyRun, WindowRun, run_strategy
from pipeline.comparison.side_by_side import jobs_of, run_jobs
from pipeline.comparison.statistics import holm, mean_with_interval, paired_difference
from pipeline.comparison.strategies import REFERENCE, STRATEGIES, TOGETHER, Strategy, chosen, with_gradient_ema
from pipeline.comparison.stream import RecordedWindow, recorded_stream
from pipeline.comparison.summary import Comparison, compare
from pipeline.config import UpdateConfig, load_config, overridden
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.evaluation.metrics import measure
from pipeline.publishing.comparison_plots import comparison_plots
from pipeline.publishing.comparison_report import as_csv, as_markdown, in_words
from pipeline.training.learner import Learner, StepResult
from pipeline.update import run_update

HOURS = 5
SPEC = load_spec("synthetic")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> UpdateConfig:
    """Settings of a click log of five small hours."""
    folder = tmp_path_factory.mktemp("comparison")
    config = load_config(
        None,
        [
            f"landing={folder / 'landing'}",
            f"state_dir={folder / 'state'}",
            "training.precision=fp32",
            "training.batch_size=64",
            "tracking.enabled=false",
        ],
    )
    write_landing(SyntheticConfig(hours=HOURS, rows_per_hour=300, traffic_ratio=2.0, late_share=0.0), folder / "landing")
    log, quarantine = ClickLog.open_or_create(config.log_path, SPEC), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, SPEC, now=SyntheticConfig().start.replace(year=2030))
    return config


@pytest.fixture(scope="module")
def stream(config: UpdateConfig) -> list[RecordedWindow]:
    """Its windows."""
    return recorded_stream(config, SPEC)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *TOGETHER], ids=lambda strategy: strategy.name)
def test_every_strategy_of_the_list_is_settings_that_exist_and_agree(strategy) -> None:  # type: ignore[no-untyped-def]
    changed = overridden(load_config(), strategy.overrides)
    assert changed != load_config() or strategy.name == "as set"


def test_the_list_has_the_reference_and_no_name_twice() -> None:
    names = [strategy.name for strategy in (*STRATEGIES, *TOGETHER)]
    assert REFERENCE in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("names", "reference", "complaint"),
    [
        (["fixed 512", "fixed 9"], "fixed 512", "unknown strategy 'fixed 9'; known are 'fixed 1', 'fixed 512'"),
        (
            ["fixed 4096", "fixed 1"],
            "fixed 512",
            "the reference 'fixed 512' is not among the strategies 'fixed 4096', 'fixed 1'",
        ),
        (["fixed 512"], "fixed 512", "two strategies or more, got 'fixed 512' alone"),
        (["fixed 512", "fixed 512"], "fixed 512", "'fixed 512' is named twice"),
    ],
)
def test_strategies_that_cannot_be_compared_are_refused(names: list[str], reference: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        chosen(names, reference)


def test_a_strategy_can_be_written_on_the_command_line() -> None:
    (_, own) = chosen(["fixed 512", "tiny: training.batch_size=8 training.warmup_steps=3"], "fixed 512")
    assert (own.name, own.overrides) == ("tiny", ("training.batch_size=8", "training.warmup_steps=3"))


def test_each_strategy_runs_once_more_with_an_average_of_its_gradients() -> None:
    both = with_gradient_ema(chosen(["fixed 512", "fixed 4096"], "fixed 512"), 0.9)
    assert [one.name for one in both] == ["fixed 512", "fixed 512, gradient EMA", "fixed 4096", "fixed 4096, gradient EMA"]
    assert both[1].overrides == (*both[0].overrides, "training.gradient_ema=0.9")
    with pytest.raises(ConfigError, match=r"gradient_ema must be in \(0, 1\), got 1.0"):
        with_gradient_ema(both, 1.0)


def test_settings_that_contradict_each_other_name_the_strategy(config: UpdateConfig) -> None:
    smoothed = with_gradient_ema(chosen(["fixed 512", "fixed 4096"], "fixed 512"), 0.9)
    with pytest.raises(ConfigError, match=r"strategy 'fixed 512, gradient EMA': training: gradient_ema = 0\.9 with"):
        jobs_of(config, smoothed, 2)


def test_past_rows_that_a_run_would_not_learn_again_are_refused(config: UpdateConfig, stream: list[RecordedWindow]) -> None:
    replaying = Strategy(name="rehearsed", overrides=("sampling.replay_share=0.2",))
    complaint = r"sampling\.replay_share = 0\.2 is not heeded .* set sampling\.replay_share to 0"
    with pytest.raises(ConfigError, match=rf"strategy 'rehearsed': {complaint}"):
        jobs_of(config, [replaying], 2)
    with pytest.raises(ConfigError, match=complaint):
        run_strategy("rehearsed", overridden(config, replaying.overrides), SPEC, stream, seed=0)


def test_threads_that_a_run_would_not_have_are_refused(config: UpdateConfig) -> None:
    for allowed in ("auto", "1"):
        jobs_of(config, [Strategy(name="quick", overrides=(f"training.threads={allowed}",))], 2)
    with pytest.raises(
        ConfigError, match=r"strategy 'quick': training\.threads = 4 is not heeded .* leave training\.threads at"
    ):
        jobs_of(config, [Strategy(name="quick", overrides=("training.threads=4",))], 2)


@pytest.mark.parametrize(("of_all", "own"), [("deepfm", "linear"), ("linear", "dcnv2")])
def test_a_linear_model_is_not_compared_with_others_on_one_recording(config: UpdateConfig, of_all: str, own: str) -> None:
    settings = overridden(config, [f"model.kind={of_all}"])
    jobs_of(settings, [Strategy(name="same", overrides=(f"model.kind={of_all}",))], 2)
    with pytest.raises(ConfigError, match=rf"strategy 'other': model\.kind = '{own}' cannot be set beside '{of_all}'"):
        jobs_of(settings, [Strategy(name="other", overrides=(f"model.kind={own}",))], 2)


def test_overridden_settings_keep_all_others(config: UpdateConfig) -> None:
    changed = overridden(config, ["training.batch_size=8"])
    assert changed.training.batch_size == 8
    assert overridden(changed, ["training.batch_size=64"]) == UpdateConfig(**config.model_dump())
    with pytest.raises(ConfigError, match=r"training.batch_sise: unknown setting"):
        overridden(config, ["training.batch_sise=8"])


def test_a_strategy_scores_what_the_updates_of_the_same_settings_score(
    config: UpdateConfig, stream: list[RecordedWindow]
) -> None:
    ours = run_strategy("as set", config, SPEC, stream, seed=0)
    theirs = []
    while (report := run_update(config)) is not None:
        theirs.append(report.before)
    assert len(ours.windows) == len(theirs) == HOURS
    assert ours.windows[0].before is theirs[0] is None
    for window, before in zip(ours.windows[1:], theirs[1:], strict=True):
        assert window.before is not None
        assert before is not None
        assert window.before.as_dict() == pytest.approx(before.as_dict(), rel=1e-6)  # float32 sums, another order of rows
    assert [window.rows_learned for window in ours.windows[:-1]] == [window.num_rows for window in stream[:-1]]


def test_a_run_is_the_same_twice_and_other_with_another_seed(config: UpdateConfig, stream: list[RecordedWindow]) -> None:
    def figures(seed: int) -> list[object]:
        done = run_strategy("as set", config, SPEC, stream, seed=seed)
        return [[window.before for window in done.windows], [point.log_loss for point in done.probe]]

    assert figures(1) == figures(1)
    assert figures(1) != figures(2)


def test_runs_in_several_processes_are_those_in_one(config: UpdateConfig, stream: list[RecordedWindow]) -> None:
    jobs = jobs_of(
        config, [Strategy(name="as set", overrides=()), Strategy(name="small", overrides=("training.batch_size=32",))], 1
    )
    one, two = (sorted(run_jobs(jobs, SPEC, stream, workers=workers), key=lambda run: run.strategy) for workers in (1, 2))
    assert [run.strategy for run in two] == ["as set", "small"]
    for alone, beside in zip(one, two, strict=True):
        assert [window.before for window in beside.windows] == [window.before for window in alone.windows]


def test_rows_over_the_cap_are_left_out_and_counted(config: UpdateConfig, stream: list[RecordedWindow]) -> None:
    capped = overridden(config, ["window.max_rows=40"])
    done = run_strategy("capped", capped, SPEC, stream, seed=0)
    assert [window.rows_learned for window in done.windows] == [40] * (HOURS - 1) + [0]
    assert [window.rows_left for window in done.windows[:-1]] == [window.num_rows - 40 for window in stream[:-1]]


def test_rows_that_the_rules_of_sampling_leave_out_are_left_out_and_counted(
    config: UpdateConfig, stream: list[RecordedWindow]
) -> None:
    thinned = overridden(config, ["sampling.negative_keep_rate=0.25"])
    done = run_strategy("thinned", thinned, SPEC, stream, seed=0)
    clicks = [int(window.predicted.labels_R.sum()) for window in stream[:-1]]
    learned = [window.rows_learned for window in done.windows[:-1]]
    assert all(clicked < rows < window.num_rows for clicked, rows, window in zip(clicks, learned, stream, strict=False))
    assert [window.rows_learned + window.rows_left for window in done.windows[:-1]] == [w.num_rows for w in stream[:-1]]


def test_a_log_of_clicks_only_is_refused(config: UpdateConfig) -> None:
    clicks_only = SPEC.model_copy(update={"label": None})
    with pytest.raises(ConfigError, match="log of clicks only"):
        recorded_stream(config, clicks_only)


def test_rows_that_a_pass_does_not_come_to_are_counted(config: UpdateConfig, stream: list[RecordedWindow]) -> None:
    hurried = overridden(config, ["budget.seconds=1e-9"])
    done = run_strategy("hurried", hurried, SPEC, stream, seed=0)
    assert [window.rows_learned for window in done.windows] == [0] * HOURS
    assert [window.rows_left for window in done.windows[:-1]] == [window.num_rows for window in stream[:-1]]


def test_seconds_that_a_window_ran_over_are_those_of_later_ones(
    config: UpdateConfig, stream: list[RecordedWindow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step takes one second, and each window has half a second."""
    now = [0.0]
    step = Learner.step

    def slow(*args: Any, **kwargs: Any) -> StepResult:
        now[0] += 1.0
        return step(*args, **kwargs)

    monkeypatch.setattr(Learner, "step", slow)
    monkeypatch.setattr(running._LearningClock, "_raw", lambda self: now[0])
    halves = overridden(config, ["budget.seconds=0.5", "training.batch_size=16"])
    done = run_strategy("half a step a window", halves, SPEC, stream, seed=0)
    assert [window.steps for window in done.windows[:4]] == [1, 0, 1, 0]


def test_the_probe_is_measured_before_and_along_every_window_that_is_learned(
    config: UpdateConfig, stream: list[RecordedWindow]
) -> None:
    done = run_strategy("small steps", overridden(config, ["training.batch_size=16"]), SPEC, stream, seed=0)
    by_window = [[point.place for point in done.probe if point.window == number] for number in range(HOURS)]
    assert [len(places) for places in by_window] == [1 + Probing().places] * (HOURS - 1) + [0]
    assert all(places[0] == number and places[-1] == number + 1 for number, places in enumerate(by_window[:-1]))
    seconds = [point.seconds for point in done.probe]
    assert seconds == sorted(seconds)


def test_the_probe_can_be_followed_more_closely(config: UpdateConfig, stream: list[RecordedWindow]) -> None:
    small_steps = overridden(config, ["training.batch_size=16"])
    usual, closer = (
        run_strategy("small steps", small_steps, SPEC, stream[:3], seed=0, probing=probing).probe
        for probing in (Probing(), Probing(places=2 * Probing().places))
    )
    assert len(closer) > len(usual)
    by_rows = {point.rows: point.log_loss for point in closer}
    assert {point.rows: point.log_loss for point in usual}.items() <= by_rows.items()


def test_jobs_follow_the_probe_as_closely_as_they_are_told_to(config: UpdateConfig, stream: list[RecordedWindow]) -> None:
    jobs = jobs_of(config, [Strategy(name="small steps", overrides=("training.batch_size=16",))], 1, probing=Probing(places=0))
    (done,) = run_jobs(jobs, SPEC, stream[:3], workers=1)
    assert [point.place for point in done.probe] == [0, 1], "at the start of each window that is learned"


def test_a_stream_ends_when_it_is_told_to(config: UpdateConfig, stream: list[RecordedWindow]) -> None:
    shorter = recorded_stream(config, SPEC, hours=3)
    assert [window.start for window in shorter] == [window.start for window in stream[:3]]
    np.testing.assert_array_equal(shorter[2].predicted.dense_RN, stream[2].predicted.dense_RN)


def test_a_strategy_that_diverges_ends_there(
    config: UpdateConfig, stream: list[RecordedWindow], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([running.learn])

    def failing(*args: object, **options: object) -> object:
        learn = next(calls, None)
        if learn is None:
            raise LearningDiverged("the loss was not finite")
        return learn(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "learn", failing)
    done = run_strategy("wild", config, SPEC, stream, seed=0)
    assert (done.diverged, len(done.windows)) == ("the loss was not finite", 1)


def made_up(strategy: str, seed: int, auc: float, *, hours: int = 6, diverged: str = "") -> StrategyRun:
    """A run whose windows have 100, 200, ... rows and AUCs around `auc`."""
    before = measure(np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.3, 0.2]), np.zeros(4))
    windows = tuple(
        WindowRun(
            start=1000 + hour,
            rows=100 * (hour + 1),
            before=replace(before, auc=auc + 0.01 * hour, log_loss=1 - auc) if hour else None,
            rows_learned=100 * (hour + 1) if hour < hours - 1 else 0,
            rows_left=0,
            seconds=0.5,
            steps=4,
            skipped_steps=0,
            batch_size=32,
        )
        for hour in range(hours)
    )
    probe = tuple(
        ProbePoint(window=h, place=h + part, rows=100 * h, seconds=0.5 * h, log_loss=0.4 + 0.002 * part - 0.001 * h)
        for h in range(hours - 1)
        for part in (0.0, 0.5, 1.0)
    )
    return StrategyRun(strategy=strategy, seed=seed, windows=windows, probe=probe, diverged=diverged)


@pytest.fixture
def compared() -> Callable[..., Comparison]:
    """The comparison of three made-up strategies with five seeds."""

    def of(*more: StrategyRun, warmup_hours: int = 2) -> Comparison:
        runs = [made_up("a", seed, 0.70 + 0.001 * seed) for seed in range(5)]
        runs += [made_up("b", seed, 0.71 + 0.001 * seed + 0.0001 * (seed % 2)) for seed in range(5)]
        runs += [made_up("c", seed, 0.69 + 0.002 * seed) for seed in range(5)]
        names = dict.fromkeys(run.strategy for run in (*runs, *more))
        return compare([*runs[::-1], *more], strategies=list(names), reference="a", warmup_hours=warmup_hours)

    return of


def test_the_table_is_of_row_weighted_means_over_judged_windows(compared: Callable[..., Comparison]) -> None:
    line = compared().line("a")
    weights = np.array([300, 400, 500, 600])
    by_seed = [np.average(0.70 + 0.001 * seed + 0.01 * np.arange(2, 6), weights=weights) for seed in range(5)]
    expected = mean_with_interval(by_seed)
    assert line.auc is not None
    assert (line.auc.mean, line.auc.low) == pytest.approx((expected.mean, expected.low))
    assert (line.rows_learned, line.seconds, line.steps) == (1500, pytest.approx(3.0), 24)
    assert line.auc_change is not None
    assert line.auc_change.mean == pytest.approx(0.01)
    assert line.probe_spread is not None
    assert line.probe_spread.mean == pytest.approx(0.001)


def test_differences_are_paired_by_seed_and_corrected_for_their_number(compared: Callable[..., Comparison]) -> None:
    comparison = compared()
    aucs = {
        name: [np.average([w.before.auc for w in comparison.judged(run)], weights=[w.rows for w in comparison.judged(run)])  # type: ignore[union-attr]
               for run in comparison.runs_of(name)]
        for name in "abc"
    }  # fmt: skip
    expected = [paired_difference(aucs[name], aucs["a"]) for name in "bc"]
    lines = [comparison.line(name) for name in "bc"]
    assert [line.auc_difference for line in lines] == expected
    assert [line.adjusted_p for line in lines] == list(holm([one.p_value for one in expected]))
    assert comparison.line("a").auc_difference is None


def test_a_strategy_of_which_a_seed_diverged_has_no_mean(compared: Callable[..., Comparison]) -> None:
    wild = [made_up("wild", 0, 0.9), made_up("wild", 1, 0.9, hours=3, diverged="the loss was not finite")]
    comparison = compared(*wild)
    line = comparison.line("wild")
    assert (line.auc, line.seeds, line.diverged) == (None, 1, 1)
    assert comparison.line("b").adjusted_p == compared().line("b").adjusted_p
    assert "Diverged: wild." in in_words(comparison)
    assert "diverged, 1 of 2" in as_markdown(comparison)


def test_a_comparison_without_a_judged_window_or_a_reference_is_refused(compared: Callable[..., Comparison]) -> None:
    with pytest.raises(ConfigError, match="nothing is left to judge after a warm-up of 6 hours"):
        compared(warmup_hours=6)
    runs = [made_up("a", seed, 0.7, diverged="x") for seed in range(2)] + [made_up("b", seed, 0.7) for seed in range(2)]
    with pytest.raises(ConfigError, match="the reference 'a' diverged"):
        compare(runs, strategies=["a", "b"], reference="a", warmup_hours=0)


def test_the_sentence_is_true_to_the_figures(compared: Callable[..., Comparison]) -> None:
    comparison = compared()
    sentence = in_words(comparison)
    best = comparison.line("b")
    assert best.auc is not None
    assert best.auc_difference is not None
    assert best.adjusted_p is not None
    assert f"b has the highest mean AUC, {best.auc.mean:.4f}, {best.auc_difference.estimate.mean:.4f} above a" in sentence
    assert best.adjusted_p < 0.05
    assert "(significant); of 2 strategies 1 rank better than a and 1 worse" in sentence
    assert "c by the most, 0.0080" in sentence


def test_the_sentence_says_what_was_left_out(compared: Callable[..., Comparison]) -> None:
    capped = [made_up("capped", seed, 0.5) for seed in range(5)]
    capped = [replace(run, windows=tuple(replace(w, rows_left=3 * w.rows_learned) for w in run.windows)) for run in capped]
    assert "Share of the rows that was learned, where it was not all: capped 25.0%." in in_words(compared(*capped))


def test_the_csv_holds_every_figure_unrounded(compared: Callable[..., Comparison]) -> None:
    comparison = compared()
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert [row["strategy"] for row in rows] == ["a", "b", "c"]
    line = comparison.line("b")
    assert line.auc is not None
    assert line.auc_difference is not None
    assert float(rows[1]["auc"]) == line.auc.mean
    assert float(rows[1]["auc_difference_low"]) == line.auc_difference.estimate.low
    assert float(rows[1]["adjusted_p"]) == line.adjusted_p
    assert rows[0]["auc_difference"] == ""


@pytest.mark.parametrize("num_more", [0, 1, 12])
def test_the_plots_draw_any_number_of_strategies(compared: Callable[..., Comparison], num_more: int) -> None:
    more = [made_up(f"strategy {k}", seed, 0.6 + 0.003 * k) for k in range(num_more) for seed in range(5)]
    for png in comparison_plots(compared(*more)).values():
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", png[16:24])
        assert width == 1500
        assert height > 400
