"""Does the diagnosis name the fault that a stream was built to have?

    python benchmarks/diagnosis.py [--seeds 50] [--first-seed 100]

In:  three days of hourly updates of a small stream of users and items whose truth is known, at healthy settings; then a fault.
Out: for each kind of stream, how often each verdict was given to the first hour of the fourth day.

    healthy   nothing changes
    rate      all learning rates times 30, in the six hours before and in this one
    batch     batches of 8, in the same hours
    drift     in this hour the items have changed their click rates among each other

The thresholds in `pipeline/evaluation/diagnosis.py` were set on seeds 0 to 5, which the default leaves out.
"""

import argparse
from collections import Counter
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from pipeline.evaluation.diagnosis import Diagnosis, Verdict
from pipeline.lab import faulty_stream
from pipeline.lab.faulty_stream import Fault

FAULTS = (
    Fault(name="healthy", expected="healthy"),
    Fault(name="rate", expected="learning_rate_too_high", rate_times=30),
    Fault(name="batch", expected="noise_limited", batch_size=8),
    Fault(name="drift", expected="drift", drifts=True),
)
EXPECTED: dict[str, Verdict] = {fault.name: fault.expected for fault in FAULTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    verdicts = [*get_args(Verdict), "not judged"]
    table = Table(title=f"verdicts on {options.seeds} seeds from {options.first_seed}")
    for name in ("stream", "right", *verdicts):
        table.add_column(name, justify="left" if name == "stream" else "right")
    given: dict[str, Counter[str]] = {fault: Counter() for fault in EXPECTED}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for fault, found in diagnosed(seed).items():
            given[fault][found.verdict or "not judged"] += 1
            if found.verdict != EXPECTED[fault]:
                print(f"{fault} {seed}: {found}", flush=True)
    for fault, expected in EXPECTED.items():
        right = f"{given[fault][expected]} of {options.seeds}"
        table.add_row(fault, right, *(str(given[fault][verdict] or "") for verdict in verdicts))
    Console(width=120).print(table)


def diagnosed(seed: int) -> dict[str, Diagnosis]:
    """What is said of the first hour of the fourth day, for each fault."""
    return {name: found.diagnosis for name, found in faulty_stream.diagnosed(seed, FAULTS).items()}


if __name__ == "__main__":
    main()
