"""Every experiment, made small: it answers in figures that are there, draws a small file, and says the same again."""

import math
from typing import Any

import pytest

from pipeline.lab import catalogue
from pipeline.lab.experiment import Finding, Run, main_of, parameters_of
from pipeline.lab.figures import small_png

MOST_BYTES = 60_000
SMALL: dict[str, dict[str, Any]] = {
    "gradient_descent": {"num_rows": 256, "sizes": (1, 32, 256), "rates": (0.1, 1.0), "passes": 1.0, "least_steps": 20},
    "epochs": {"num_rows": (100, 33), "sizes": (1, 8, 64)},
    "gradient_variance": {"num_rows": 512, "sizes": (4, 16, 64), "draws": 40},
    "hardware": {"sizes": (8, 64), "rounds": 2, "matrix": 24, "block": 8},
    "time_to_target": {
        "num_rows": 512,
        "sizes": (16, 64, 256),
        "share": 0.3,
        "rates": (0.3, 0.6, 1.2, 2.4),
        "seeds": 4,
        "most_rows": 6000,
        "most_steps": 40,
        "timed_steps": 10,
    },
    "best_rate": {"num_rows": 512, "sizes": (16, 64, 256), "steps": 15, "draws": 40, "seeds": 4},
    "noise_scale": {"num_rows": 512, "subset_rows": 16, "subsets": 32, "after_steps": (0, 10)},
    "data_efficiency": {
        "num_rows": 512,
        "sizes": (16, 64, 128, 256),
        "share": 0.3,
        "rates": (0.3, 0.6, 1.2, 2.4),
        "seeds": 4,
        "most_rows": 6000,
        "most_steps": 40,
    },
    "sharpness": {"num_rows": 256, "sizes": (16, 128), "small_passes": 2, "most_steps": 60, "seeds": 2, "directions": 1},
    "temperature": {"num_rows": 256, "sizes": (16, 64), "passes": 4, "seeds": 1},
    "escape": {"batch_sizes": (8, 16), "rows": 4000, "runs": 20},
    "large_batch_rules": {"reference_batch": 32, "times": 4, "num_rows": 256, "passes": 1, "seeds": 2},
    "gradient_accumulation": {"batch_size": 32, "micro_batch_sizes": (4, 16), "rows": 64},
    "mixed_precision": {"batch_sizes": (64, 512), "training_batch": 64, "num_rows": 256, "rounds": 1, "seeds": 1},
    "decay_or_grow": {"batch_size": 16, "factor": 2, "marks": (1,), "passes": 2, "num_rows": 256, "seeds": 2},
    "replacement": {"num_rows": 32, "learning_rates": (0.05, 0.1), "runs": 4, "passes": 12},
    "weight_decay": {"batch_sizes": (16, 64), "decays": (0.001, 0.1), "num_rows": 256, "passes": 2, "seeds": 1},
    "normalisation": {"batch_sizes": (16, 64), "num_rows": 256, "seeds": 2},
    "power_of_two": {"powers": (3, 4), "offsets": (0.7, 1.3), "rounds": 2},
    "warmup_length": {"batch_sizes": (32, 128), "shares": (0.0, 0.5), "num_rows": 256, "passes": 2, "seeds": 1},
    "devices": {"workers": 2, "batch_size": 16, "periods": (4,), "num_rows": 256, "passes": 1, "seeds": 1},
    "rate_or_batch": {"rate_times": (30.0,), "batch_sizes": (), "days": 1},
}
"""Parameters that make an experiment take a moment."""
TIMED = ("hardware", "time_to_target", "gradient_descent", "mixed_precision", "power_of_two")
"""Their figures hold seconds, which no second run repeats."""
LONG = ("rate_or_batch",)
"""Even small they take seconds."""
REPEATED = [
    pytest.param(run, marks=pytest.mark.slow) if run.__module__.endswith(LONG) else run
    for run in catalogue.EXPERIMENTS
    if not run.__module__.endswith(TIMED)
]


def name_of(run: Run) -> str:
    return run.__module__.rpartition(".")[2]


def small(run: Run) -> Finding:
    return run(**SMALL[name_of(run)])


@pytest.mark.parametrize("run", catalogue.EXPERIMENTS, ids=name_of)
def test_it_answers_and_draws(run: Run) -> None:
    finding = small(run)
    assert finding.name == name_of(run)
    assert finding.question.endswith("?")
    assert finding.sentence.endswith(".")
    assert finding.rows
    assert finding.metrics
    assert all(isinstance(value, float) for value in finding.metrics.values())
    assert len(small_png(finding.figure)) < MOST_BYTES
    for axes in finding.figure.axes:
        title = axes.get_title(loc="left")
        right_end = axes._left_title.get_window_extent().x1
        assert right_end <= finding.figure.bbox.width, f"the title {title!r} is cut off"


@pytest.mark.parametrize("run", REPEATED, ids=name_of)
def test_it_finds_the_same_again(run: Run) -> None:
    first, again = small(run), small(run)
    assert first.sentence == again.sentence
    assert first.rows == again.rows
    assert {name: str(value) for name, value in first.metrics.items()} == {n: str(v) for n, v in again.metrics.items()}


@pytest.mark.parametrize("run", catalogue.EXPERIMENTS, ids=name_of)
def test_its_parameters_have_defaults_and_are_explained(run: Run) -> None:
    assert set(SMALL[name_of(run)]) <= set(parameters_of(run))
    assert run.__doc__ is not None
    assert all(f"        {name}: " in run.__doc__ for name in parameters_of(run))


@pytest.mark.parametrize("run", catalogue.EXPERIMENTS, ids=name_of)
def test_it_is_a_command_whose_help_names_every_parameter(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main_of(run, ["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"python -m {run.__module__} " in printed
    assert all(f"--{name.replace('_', '-')}" in printed for name in [*parameters_of(run), "figure"])


def test_the_sentence_about_variance_follows_the_result() -> None:
    """With a slope that is not -1 it does not say yes."""
    from pipeline.lab.gradient_variance import _finding

    sizes = (4, 16, 64)
    flat = {kind: [1.0, 0.9, 0.8] for kind in ("with", "without", "stratified")}
    right = {kind: [4.0 / b for b in sizes] for kind in ("with", "without", "stratified")}
    assert _finding(10**9, sizes, 10, 4.0, flat, 1.0).sentence.startswith("Not quite")
    assert _finding(10**9, sizes, 10, 4.0, right, 1.0).sentence.startswith("Yes")
    assert math.isclose(_finding(10**9, sizes, 10, 4.0, right, 1.0).metrics["slope_with"], -1.0)
