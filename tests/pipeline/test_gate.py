"""The gate: its figures against scikit-learn and formulas by hand, each rule by a pair made for it, and through whole
updates."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, t
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

import pipeline.update as update
from data_schemas.dataset import load_spec
from data_schemas.errors import TrackingUnavailable
from data_schemas.hashing import MISSING, mix64
from pipeline.config import UpdateConfig, load_config, overridden
from pipeline.data.held import decide, held_windows
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.describe import one_line
from pipeline.evaluation.champion import gate_verdict
from pipeline.evaluation.gate import GateVerdict, Limits, judge
from pipeline.evaluation.paired import Difference, Evidence, Paired, differences, held_out
from pipeline.model_state import restore_or_create
from pipeline.outcome import UpdateReport
from pipeline.publishing import publish
from pipeline.publishing.checkpoint import (
    current_version,
    forget_unpublished,
    head_version,
    load_dense,
    next_version,
    read_manifest,
    versions,
)
from pipeline.publishing.report import read_history
from pipeline.publishing.tracking import open_experiment, quiet_mlflow
from pipeline.training.batch_size import RecordedPlan
from pipeline.update import run_update

LIMITS = Limits()
USERS = 200


def pair_of(rows: int = 4000, *, seed: int = 0, better: float = 0.0, noise: float = 0.3, effect: float = 0.0) -> Paired:
    """Two noisy views of the true log odds; the challenger's is `better` times nearer. `effect`: of a user on both errors."""
    rng = np.random.default_rng(seed)
    num_users = 40 if effect else USERS
    users = rng.integers(1, num_users + 1, rows)
    log_odds = rng.normal(-2, 1, rows) + rng.normal(0, effect, num_users + 1)[users]
    labels = rng.random(rows) < 1 / (1 + np.exp(-log_odds))
    of_user = rng.normal(0, effect, num_users + 1)[users] if effect else 0.0
    champion = log_odds + rng.normal(0, noise, rows) + of_user
    challenger = log_odds + rng.normal(0, noise, rows) * (1 - better) - of_user
    return Paired(
        labels_H=labels.astype(np.float32),
        champion_H=(1 / (1 + np.exp(-champion))).astype(np.float32),
        challenger_H=(1 / (1 + np.exp(-challenger))).astype(np.float32),
        weights_H=np.ones(rows, np.float32),
        user_H=mix64(users.astype(np.uint64)),
    )


def verdict(
    pair: Paired, *, limits: Limits = LIMITS, windows: int = 1, gains: tuple[float, ...] = (), skipped: int = 0
) -> GateVerdict:
    return judge(pair, limits=limits, windows=windows, past_gains=gains, skipped_steps=skipped, steps=20, seed=(1, 2))


def failed(found: GateVerdict) -> list[str]:
    return [figure.name for figure in found.figures if not figure.passed]


def test_differences_are_those_of_scikit_learn_with_weights() -> None:
    pair = pair_of(better=0.5)
    pair = replace(pair, weights_H=np.random.default_rng(1).choice([1.0, 2.5, 10.0], 4000).astype(np.float32))
    found = differences(pair, num_samples=50, seed=(0,))
    aucs, losses = (
        [measure(pair.labels_H, scores, sample_weight=pair.weights_H) for scores in (pair.champion_H, pair.challenger_H)]
        for measure in (roc_auc_score, sklearn_log_loss)
    )
    assert found.auc is not None
    assert found.auc.value == pytest.approx(aucs[1] - aucs[0], abs=1e-6)
    assert found.log_loss.value == pytest.approx(1 - losses[1] / losses[0], abs=1e-6)


def test_the_bootstrap_is_that_of_a_loop_over_samples_of_users() -> None:
    pair = pair_of(1500, better=0.5, effect=0.5)
    found = differences(pair, num_samples=600, seed=(0,))
    rng, drawn = np.random.default_rng(9), []
    users = np.unique(pair.user_H)
    for _ in range(300):
        rows = np.concatenate([np.flatnonzero(pair.user_H == user) for user in rng.choice(users, len(users))])
        both = (pair.champion_H, pair.challenger_H)
        champion, challenger = (roc_auc_score(pair.labels_H[rows], scores[rows]) for scores in both)
        drawn.append(challenger - champion)
    assert found.auc is not None
    assert found.auc.error == pytest.approx(np.std(drawn, ddof=1), rel=0.15)


def test_delong_is_its_formula_over_all_pairs() -> None:
    pair = pair_of(300, better=0.5)
    clicked = pair.labels_H > 0
    wins = [
        (scores[clicked][:, None] > scores[~clicked]) + 0.5 * (scores[clicked][:, None] == scores[~clicked])
        for scores in (pair.champion_H, pair.challenger_H)
    ]
    difference = wins[1] - wins[0]
    variance = difference.mean(axis=1).var(ddof=1) / clicked.sum() + difference.mean(axis=0).var(ddof=1) / (~clicked).sum()
    found = differences(pair, num_samples=50, seed=(0,)).delong
    assert found is not None
    assert found.high - found.low == pytest.approx(2 * norm.ppf(0.975) * np.sqrt(variance), rel=1e-6)
    assert (found.high + found.low) / 2 == pytest.approx(difference.mean(), abs=1e-7)


def test_the_interval_over_users_holds_where_delong_is_too_sure() -> None:
    missed = {"users": 0, "rows": 0}
    for seed in range(60):
        pair = pair_of(2000, seed=seed, effect=1.5)
        found = differences(pair, num_samples=100, seed=(seed,))
        assert found.auc is not None
        assert found.delong is not None
        interval = found.auc.interval()
        missed["users"] += not interval.low <= 0 <= interval.high
        missed["rows"] += not found.delong.low <= 0 <= found.delong.high
    assert missed["users"] <= 8, "designed for 5 %: 3 of 60"
    assert missed["rows"] > missed["users"] + 3


def test_the_chance_of_harm_is_students() -> None:
    worse = Difference(value=-0.02, error=0.01, freedom=9)
    assert worse.chance_of_harm_by_luck() == pytest.approx(t.cdf(-2, 9))
    assert worse.interval(0.95).low == pytest.approx(-0.02 - t.ppf(0.975, 9) * 0.01)
    assert Difference(value=0.0, error=0.0, freedom=1).chance_of_harm_by_luck() == 1


def test_a_better_model_is_published_and_a_worse_one_rejected() -> None:
    assert verdict(pair_of(better=1.0, noise=1.0)).decision == "publish"
    pair = pair_of(better=1.0, noise=1.0)
    swapped = replace(pair, champion_H=pair.challenger_H, challenger_H=pair.champion_H)
    found = verdict(swapped, limits=replace(LIMITS, max_churn=10))
    assert (found.decision, failed(found)) == ("reject", ["AUC", "log loss"])
    assert "luck" in found.reason


def test_equal_models_are_published_once_they_are_known_closely_enough() -> None:
    assert verdict(pair_of(8000, noise=0.05)).decision == "publish"
    few = pair_of(200, noise=0.8)
    assert verdict(few).decision == "hold"
    assert verdict(few, windows=LIMITS.max_windows).decision == "publish", "after so many windows no proof of harm is enough"


def test_with_one_user_luck_cannot_be_told_and_the_model_waits() -> None:
    for seed in range(20):
        pair = pair_of(200, seed=seed)
        found = verdict(replace(pair, user_H=np.full(200, pair.user_H[0])), limits=replace(LIMITS, max_churn=10))
        assert (found.decision, found.auc_difference) == ("hold", None)


def test_with_few_clicks_equal_models_are_rejected_no_more_often_and_wait() -> None:
    rng, decisions = np.random.default_rng(0), []
    limits = replace(LIMITS, bootstrap_samples=100, max_churn=10, copc_bounds=(1e-6, 1e6))
    for _ in range(300):
        users, log_odds = rng.integers(1, 101, 400), rng.normal(-4.5, 0.5, 400)
        pair = Paired(
            labels_H=(rng.random(400) < 1 / (1 + np.exp(-log_odds))).astype(np.float32),
            champion_H=(1 / (1 + np.exp(-log_odds - rng.normal(0, 0.5, 400)))).astype(np.float32),
            challenger_H=(1 / (1 + np.exp(-log_odds - rng.normal(0, 0.5, 400)))).astype(np.float32),
            weights_H=np.ones(400, np.float32),
            user_H=mix64(users.astype(np.uint64)),
        )
        decisions.append(verdict(pair, limits=limits).decision)
    assert decisions.count("reject") <= 12, "4 % of 300, where 1 % is designed"
    assert decisions.count("publish") <= 30, "five clicks prove nothing"


def test_the_chance_of_a_false_rejection_is_spent_over_the_windows() -> None:
    pair = pair_of(better=1.0, noise=0.3)
    worse = replace(pair, champion_H=pair.challenger_H, challenger_H=pair.champion_H)
    found = differences(worse, num_samples=500, seed=(1, 2))
    assert found.log_loss is not None
    chance = found.log_loss.chance_of_harm_by_luck()
    just_enough = replace(LIMITS, false_rejections=chance * 2 * 2 * 1.01)
    assert "log loss" in failed(verdict(worse, limits=just_enough, windows=1))
    assert "log loss" not in failed(verdict(worse, limits=just_enough, windows=2))


def test_any_finite_model_is_better_than_one_that_is_not() -> None:
    for value in (np.nan, np.inf):
        found = verdict(replace(pair_of(), champion_H=np.full(4000, value, np.float32)))
        assert (found.decision, found.reason) == (
            "publish",
            "4,000 of 4,000 predictions of the model that serves are not finite",
        )
        assert found.auc_difference is None


def test_of_very_many_rows_those_of_some_users_are_compared() -> None:
    pair = pair_of(4000)
    some = pair.at_most(1000, (1, 2))
    assert 700 < len(some.labels_H) < 1300
    assert not np.isin(pair.user_H[~np.isin(pair.user_H, some.user_H)], some.user_H).any()
    assert np.isin(pair.user_H, some.user_H).sum() == len(some.labels_H), "all rows of a user, or none"
    assert pair.at_most(4000, (1, 2)) is pair


@pytest.mark.parametrize(
    ("broken", "figure"),
    [
        ({"challenger_H": np.float32(np.nan)}, "finite"),
        ({"challenger_H": np.float32(0.9)}, "COPC"),
        ({"challenger_H": np.float32(1e-6)}, "churn"),
    ],
)
def test_a_broken_model_is_rejected(broken: dict[str, np.float32], figure: str) -> None:
    pair = pair_of()
    found = verdict(replace(pair, **{name: np.full(4000, value) for name, value in broken.items()}))
    assert found.decision == "reject"
    assert figure in failed(found)


def test_a_click_rate_that_moved_is_no_fault_of_the_challenger() -> None:
    pair = pair_of(noise=0.05)
    low = {"champion_H": pair.champion_H / 4, "challenger_H": pair.challenger_H / 3}
    assert "COPC" not in failed(verdict(replace(pair, **low)))
    assert "COPC" in failed(verdict(replace(pair, champion_H=low["challenger_H"], challenger_H=low["champion_H"])))


def test_too_good_to_be_true_is_rejected_only_against_a_history() -> None:
    pair = pair_of()
    leak = replace(pair, challenger_H=np.where(pair.labels_H > 0, 0.4, 0.1).astype(np.float32))
    assert "gain of AUC" not in failed(verdict(leak, gains=(0.01,) * 11))
    found = verdict(leak, gains=(0.01, 0.02) * 6)
    assert (found.decision, failed(found)) == ("reject", ["gain of AUC"])
    assert verdict(pair_of(better=1.0), gains=(0.01, 0.02) * 6).decision == "publish"


def test_skipped_steps_and_no_rows() -> None:
    assert failed(verdict(pair_of(), skipped=2)) == ["skipped steps"]
    nothing = Paired(**{name: array[:0] for name, array in vars(pair_of(10)).items()})
    found = verdict(nothing)
    assert (found.decision, found.auc_difference, found.log_loss_difference) == ("hold", None, None)
    one_class = replace(pair_of(), labels_H=np.zeros(4000, np.float32))
    assert verdict(one_class).auc_difference is None


def test_skipped_steps_are_a_share_of_the_steps_that_were_made_whatever_their_sizes() -> None:
    evidence, config = Evidence(pair=pair_of(noise=0.05), windows=1), load_config()
    rows: Any = SimpleNamespace(seed=(0, 1))
    ramp: Any = SimpleNamespace(rows=1000, last_batch_size=500, steps=36, skipped_steps=1)
    assert "skipped steps" not in failed(gate_verdict(evidence, rows, ramp, config, ()))
    few: Any = SimpleNamespace(rows=1000, last_batch_size=20, steps=10, skipped_steps=1)
    assert "skipped steps" in failed(gate_verdict(evidence, rows, few, config, ()))


@given(
    rows=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    extreme=st.sampled_from([0.0, 1.0, 0.5, float("nan"), float("inf")]),
    other_extreme=st.sampled_from([0.0, 1.0, 0.5, float("nan"), float("inf")]),
    users=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_any_pair_gets_a_verdict_whatever_the_order_of_rows(
    rows: int, seed: int, extreme: float, other_extreme: float, users: int
) -> None:
    rng = np.random.default_rng(seed)
    pair = pair_of(rows, seed=seed)
    pair = replace(
        pair,
        challenger_H=np.where(rng.random(rows) < 0.3, np.float32(extreme), pair.challenger_H).astype(np.float32),
        champion_H=np.where(rng.random(rows) < 0.1, np.float32(other_extreme), pair.champion_H).astype(np.float32),
        user_H=np.where(rng.random(rows) < 0.2, MISSING, mix64(rng.integers(0, users, rows).astype(np.uint64))),
    )
    limits = replace(LIMITS, bootstrap_samples=50)
    found = verdict(pair, limits=limits)
    order = rng.permutation(rows)
    other = verdict(Paired(**{name: array[order] for name, array in vars(pair).items()}), limits=limits)
    assert found.decision == other.decision
    values = [value for figure in found.figures for value in (figure.value, figure.low, figure.high) if value is not None]
    assert not np.isnan(values).any()


def test_about_the_share_of_users_is_held_out_and_others_with_another_salt() -> None:
    users = mix64(np.repeat(np.arange(5000, dtype=np.uint64), 3))
    first, second = (held_out(users, share=0.1, salt=(7, hour)) for hour in (1, 2))
    assert first.mean() == pytest.approx(0.1, abs=0.015)
    assert (first & second).mean() == pytest.approx(0.01, abs=0.006)
    assert (first.reshape(-1, 3).all(axis=1) == first.reshape(-1, 3).any(axis=1)).all(), "all rows of a user, or none"
    nobody = held_out(np.full(5000, MISSING), share=0.1, salt=(7, 1))
    assert nobody.mean() == pytest.approx(0.1, abs=0.015)


def test_evidence_is_the_same_after_a_checkpoint() -> None:
    evidence = Evidence(pair=pair_of(50), windows=3)
    again = Evidence.of_arrays(evidence.arrays())
    assert again.windows == 3
    assert all(np.array_equal(array, getattr(again.pair, name)) for name, array in vars(evidence.pair).items())


TOML = """
name = "tiny"
user = "user"
event_key = ["event_id"]
[time]
column = "time"
[label]
column = "label"
[[categorical]]
name = "user"
type = "integer"
capacity = 64
embedding_dim = 4
"""
HOURS = 4


@pytest.fixture
def config(tmp_path: Path, request: pytest.FixtureRequest) -> UpdateConfig:
    (tmp_path / "tiny.toml").write_text(TOML)
    (tmp_path / "landing").mkdir()
    places = [f"dataset={tmp_path / 'tiny.toml'}", f"landing={tmp_path / 'landing'}", f"state_dir={tmp_path / 'state'}"]
    own = ["model.hidden=[4]", "model.interaction_dim=4", "training.precision='fp32'", "training.batch_size=64"]
    gate = ["training.micro_batch_size=64", "tracking.enabled=false", "alarms.action='off'", "gate.action='enforce'"]
    margins = ["gate.bootstrap_samples=50", "gate.max_churn=10", "gate.holdout_share=0.4"]
    config = load_config(overrides=[*places, *own, *gate, *margins])
    for hour in range(HOURS):
        write_hour(config, hour, spread=getattr(request, "param", 0.3))
    spec = load_spec(config.dataset)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, spec, now=datetime.now(UTC))
    return config


def write_hour(config: UpdateConfig, hour: int, *, rows: int = 400, spread: float) -> None:
    rng = np.random.default_rng(hour)
    users = rng.integers(0, 50, rows)
    table = pa.table(
        {
            "event_id": [f"{hour}-{place}" for place in range(rows)],
            "time": pa.array([datetime(2026, 1, 1, hour, tzinfo=UTC)] * rows, pa.timestamp("us", "UTC")),
            "label": (rng.random(rows) < np.where(users < 25, 0.2, 0.2 + spread)).astype(int),
            "user": users,
        }
    )
    pq.write_table(table, f"{config.landing}/hour-{hour}.parquet")


def learn_all(config: UpdateConfig, *, most: int = 12) -> list[UpdateReport]:
    reports: list[UpdateReport] = []
    while len(reports) < most and (report := run_update(config)):
        reports.append(report)
    return reports


def test_held_out_rows_are_learned_with_the_next_window(config: UpdateConfig) -> None:
    reports = learn_all(overridden(config, ["gate.max_windows=1", "gate.false_rejections=0.000001"]))
    assert [report.outcome for report in reports] == ["published"] * HOURS
    assert (reports[0].gate, reports[0].rows_held_out) == (None, 0), "there was no model to compare with"
    for before, report in itertools.pairwise(reports):
        assert report.rows == 400 + before.rows_held_out
        assert 0 < report.rows_held_out == report.rows_pending
        assert report.rows_learned == report.rows - report.rows_held_out
        assert report.gate is not None
        assert report.gate.rows == report.rows_held_out
    assert sum(report.rows_learned for report in reports) + reports[-1].rows_pending == 400 * HOURS


def test_the_line_of_the_log_says_what_the_gate_decided_and_why(report: Callable[..., UpdateReport]) -> None:
    undecided, proven = verdict(pair_of(200, noise=0.8)), verdict(pair_of(8000, noise=0.05))
    held = one_line(report(2, outcome="held", serving=1, gate=undecided))
    assert held.endswith(f", gate: hold ({undecided.reason}), version 1 goes on serving")
    assert one_line(report(2, gate=proven)).endswith("1.5 of 60 s, gate: publish")
    assert one_line(report(2)).endswith("1.5 of 60 s")


@pytest.mark.parametrize("config", [0.0], indirect=True)
def test_a_model_that_is_not_proven_learns_on_and_serves_once_windows_have_gone_by(config: UpdateConfig) -> None:
    undecided = ["gate.auc_margin=0.000001", "gate.max_windows=3", "gate.false_rejections=0.000001"]
    config = overridden(config, undecided)
    served = []
    for _ in range(HOURS):
        report = run_update(config)
        assert report is not None
        served.append((report.outcome, report.gate and report.gate.windows, current_version(config.model_dir)))
        held = report.outcome == "held"
        assert head_version(config.model_dir) == (report.version if held else None)
        assert (report.serving == 1) == held
    assert served == [("published", None, 1), ("held", 1, 1), ("held", 2, 1), ("published", 3, 4)]
    state = restore_or_create(config, load_spec(config.dataset))
    assert (state.version, state.serving, state.evidence) == (4, None, None)


def test_an_unproven_model_goes_on_bit_for_bit(config: UpdateConfig) -> None:
    always = ["gate.auc_margin=1.0", "gate.false_rejections=0.000001"]
    never = ["gate.auc_margin=0.000001", "gate.false_rejections=0.000001", "gate.max_windows=99"]
    weights = []
    for name, margins in (("first", always), ("second", never)):
        own = overridden(config, [*margins, f"model_name='{name}'"])
        version = learn_all(own)[-1].version
        weights.append(load_dense(own.model_dir, read_manifest(own.model_dir, version)))
    assert all((tensor == weights[1][name]).all() for name, tensor in weights[0].items() if name.startswith("weight."))


def test_a_rejected_window_is_held_aside_and_learned_once_released(config: UpdateConfig) -> None:
    assert [report.outcome for report in learn_all(config, most=1)] == ["published"]
    broken = overridden(config, ["training.dense_learning_rate=5.0", "training.wide_learning_rate=50.0", "gate.max_churn=0.5"])
    rejected = run_update(broken)
    assert rejected is not None
    assert rejected.gate is not None
    assert (rejected.outcome, rejected.version, rejected.rows_learned) == ("rejected", 1, 0)
    assert (current_version(config.model_dir), head_version(config.model_dir)) == (1, None)
    (held,) = held_windows(config.model_dir)
    assert (held.kind, held.num_rows, held.reason) == ("gate", 400, rejected.gate.reason)
    going_on = overridden(config, ["gate.auc_margin=1.0", "gate.false_rejections=0.000001"])
    reports = learn_all(going_on)
    assert [report.window_start.hour for report in reports] == [2, 3]
    decide(config.model_dir, held.id, "released")
    (released,) = learn_all(going_on)
    assert (released.outcome, released.rows, released.gate) == ("published", 400, None), "a person decided already"


def test_a_rejection_forgets_what_was_not_proven_and_its_windows_wait_again(config: UpdateConfig) -> None:
    undecided = overridden(config, ["gate.auc_margin=0.000001", "gate.false_rejections=0.000001"])
    first, held = learn_all(undecided, most=2)
    assert (first.outcome, held.outcome) == ("published", "held")
    rates = ["training.dense_learning_rate=5.0", "training.wide_learning_rate=50.0"]
    rejected = run_update(overridden(undecided, [*rates, "gate.max_churn=0.1"]))
    assert rejected is not None
    assert rejected.outcome == "rejected"
    assert (rejected.window_start.hour, head_version(config.model_dir)) == (2, None)
    again = run_update(undecided)
    assert again is not None
    assert (again.window_start.hour, again.rows) == (1, 400), "no row of it is held aside with the next window"
    assert again.gate is not None
    assert again.gate.rows == held.rows_held_out > 0, "the same users judge it again"
    (aside,) = held_windows(config.model_dir)
    assert aside.num_rows == 400
    assert (held.version, again.version) == (2, 3), "another model gets another number"
    assert [record["version"] for record in read_history(config.model_dir) if record["outcome"] == "held"] == [2, 3]


def test_the_number_of_a_forgotten_version_stays_taken(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("v000001", "v000002.unpublished", "v000003.unpublished"):
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest.json").write_text("{}")
    forget_unpublished(tmp_path)
    assert next_version(tmp_path) == 4
    assert sorted(path.name for path in folder.iterdir()) == ["v000001", "v000003.forgotten"]
    assert not list((folder / "v000003.forgotten").iterdir())
    assert (versions(tmp_path), head_version(tmp_path)) == ([1], None)


def test_a_rejected_challenger_leaves_the_registry_if_not_at_once_then_with_the_next_update(
    config: UpdateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    undecided = ["gate.auc_margin=0.000001", "gate.false_rejections=0.000001", "tracking.enabled=true"]
    config = overridden(config, undecided)

    def aliases() -> dict[str, int]:
        with quiet_mlflow():
            model = open_experiment(config)[0].get_registered_model("tiny-hourly")
        return {alias: int(version) for alias, version in model.aliases.items()}

    def unreachable(*_: object) -> bool:
        raise TrackingUnavailable("it is down")

    learn_all(config, most=2)
    assert aliases() == {"champion": 1, "challenger": 2}
    rates = ["training.dense_learning_rate=5.0", "training.wide_learning_rate=50.0", "gate.max_churn=0.1"]
    with monkeypatch.context() as patched:
        patched.setattr(publish, "withdraw_challenger", unreachable)
        rejected = run_update(overridden(config, rates))
    assert rejected is not None
    assert rejected.outcome == "rejected"
    assert any("until the next update that reaches it" in note for note in rejected.notes)
    assert aliases() == {"champion": 1, "challenger": 2}
    next_hour = timedelta(hours=1)
    later = replace(rejected, window_start=rejected.window_start + next_hour, window_end=rejected.window_end + next_hour)
    assert publish.track_only(config, later) == ()
    assert aliases() == {"champion": 1}


@pytest.mark.parametrize("stratified", ["false", "true"])
def test_a_recorded_plan_repeats_an_update_that_ended_early_with_rows_held_out_and_left_out(
    config: UpdateConfig, monkeypatch: pytest.MonkeyPatch, stratified: str
) -> None:
    sizes = ["training.batch_size=8", "training.micro_batch_size=8", f"sampling.stratified_batches={stratified}"]
    proven = ["gate.auc_margin=1.0", "gate.false_rejections=0.000001", "sampling.negative_keep_rate=0.5"]
    config = overridden(config, [*sizes, *proven, "evaluation.probe_rows=0"])
    first, second = (overridden(config, [f"model_name='{name}'"]) for name in ("first", "second"))
    for own in (first, second):
        assert run_update(own) is not None
    seconds = itertools.count()
    stopped = run_update(overridden(first, ["budget.seconds=50"]), clock=lambda: float(next(seconds)))
    assert stopped is not None
    assert stopped.rows_held_out > 0
    assert any("out of time" in note for note in stopped.notes)
    manifest = read_manifest(first.model_dir, stopped.version)
    assert manifest.permutation_position == stopped.rows_learned > 0
    plan = RecordedPlan(records=manifest.plan_records(), stopped_at=manifest.permutation_position)
    monkeypatch.setattr(update, "batch_policy", lambda *_, **__: plan)
    repeated = run_update(second)
    assert repeated is not None
    assert repeated.rows_learned == stopped.rows_learned
    weights = [load_dense(own.model_dir, read_manifest(own.model_dir, stopped.version)) for own in (first, second)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    tables = [restore_or_create(own, load_spec(own.dataset)).learner.model.tables.slices() for own in (first, second)]
    assert all(torch.equal(one.tensor, other.tensor) for one, other in zip(*tables, strict=True))


def test_to_observe_publishes_and_says_what_the_gate_would_have_done(config: UpdateConfig) -> None:
    config = overridden(config, ["gate.action='observe'", "gate.auc_margin=0.000001", "gate.false_rejections=0.000001"])
    reports = learn_all(config, most=2)
    assert [report.outcome for report in reports] == ["published", "published"]
    assert reports[1].gate is not None
    assert reports[1].gate.decision == "hold"
    assert any("only to observe" in note for note in reports[1].notes)


def test_a_released_window_does_not_publish_what_is_on_hold(config: UpdateConfig) -> None:
    undecided = overridden(config, ["gate.auc_margin=0.000001", "gate.false_rejections=0.000001"])
    rates = ["training.dense_learning_rate=5.0", "training.wide_learning_rate=50.0"]
    assert [report.outcome for report in learn_all(undecided, most=1)] == ["published"]
    rejected = run_update(overridden(undecided, [*rates, "gate.max_churn=0.1"]))
    held = run_update(undecided)
    assert rejected is not None
    assert held is not None
    assert (rejected.outcome, held.outcome) == ("rejected", "held")
    (aside,) = held_windows(config.model_dir)
    decide(config.model_dir, aside.id, "released")
    evidence = restore_or_create(undecided, load_spec(config.dataset)).evidence
    report = run_update(undecided)
    assert report is not None
    assert (report.outcome, report.rows, report.gate, report.serving) == ("held", 400, None, 1)
    state = restore_or_create(undecided, load_spec(config.dataset))
    assert (state.serving, current_version(config.model_dir)) == (1, 1)
    assert state.evidence is not None
    assert evidence is not None
    assert (state.evidence.windows, len(state.evidence.pair.labels_H)) == (evidence.windows, len(evidence.pair.labels_H))


@pytest.mark.parametrize("config", [0.0], indirect=True)
@pytest.mark.parametrize("older", [False, True], ids=["the only one", "with one before it"])
def test_a_corrupt_champion_is_set_aside_and_not_the_challenger(config: UpdateConfig, older: bool) -> None:
    undecided = ["gate.auc_margin=0.000001", "gate.max_windows=99", "gate.false_rejections=0.000001"]
    if older:
        assert learn_all(overridden(config, ["gate.action='off'"]), most=1)[0].outcome == "published"
    config = overridden(config, undecided)
    if older:
        assert run_update(overridden(config, ["gate.action='off'"])) is not None
    champion = 2 if older else 1
    *_, held = learn_all(config, most=1 if older else 2)
    assert (held.outcome, held.version, current_version(config.model_dir)) == ("held", champion + 1, champion)
    (config.model_dir / f"checkpoints/v{champion:06d}/dense.safetensors").write_bytes(b"rotten")
    state = restore_or_create(config, load_spec(config.dataset))
    assert (state.version, state.evidence) == (held.version, None)
    assert state.serving == (1 if older else None)
    assert current_version(config.model_dir) == (1 if older else held.version)
    assert versions(config.model_dir) == [1 if older else held.version]
    assert any(f"v{champion:06d}" in note and "set aside" in note for note in state.notes)
    again = restore_or_create(config, load_spec(config.dataset))
    assert (again.version, again.serving, again.evidence) == (state.version, state.serving, None)
    report = run_update(config)
    assert report is not None
    assert (report.window_start, report.gate and report.gate.windows) == (held.window_end, 1)
    assert report.serving == (1 if older else held.version)
