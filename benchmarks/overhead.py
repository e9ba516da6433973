"""How long is an hourly update of 1,000 rows as a process, and whose are the seconds: ours, or the libraries'?

In:  nothing; hours of synthetic clicks are generated in a temporary folder. Out: one table of the parts of the update, with
     whose they are; then the whole process against what was wanted, and how soon `--help` and `flows/status.py` answer.

    python benchmarks/overhead.py [--repetitions 5] [--rows 1000] [--seed 0]

Each repetition is one more hour for one model: its file comes into the landing folder, and `python flows/hourly_update.py`
ingests, learns and publishes it, with Prefect's temporary server, MLflow's run and the registered model. One hour more is
learned beforehand, which makes the model and MLflow's database. Each repetition is timed as it is, and one hour more runs under
`benchmarks/whose_seconds.py`, which looks at the main thread every 5 ms. Figures are medians; `CPU s` is the main thread's.
Where other work runs on the cores, judge by CPU time: waiting for a core is charged to whoever waits.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WANTED_SECONDS = 15.0
WANTED_OURS_SECONDS = 5.0
SMALL_SECONDS = 0.1
"""Parts below this are shown in one line."""

Owner = tuple[str, str]
"""Whose, and which part."""
Parts = dict[Owner, tuple[float, float]]
"""Seconds by the wall, and of the main thread's CPU."""


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--repetitions", type=int, default=5)
    cli.add_argument("--rows", type=int, default=1000)
    cli.add_argument("--seed", type=int, default=0)
    options = cli.parse_args()
    parts, timed = list[Parts](), defaultdict[str, list[tuple[float, float]]](list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        arrivals = _arrivals(folder, 2 * options.repetitions + 1, options.rows, options.seed)
        update = ["flows/hourly_update.py", "--dataset", "synthetic", "--landing", str(folder / "landing")]
        update += ["--state-dir", str(folder / "state")]
        next(arrivals)
        print(f"first update: {_run(folder, update)[0]:.1f} s", file=sys.stderr)
        for _ in range(options.repetitions):
            next(arrivals)
            timed["flows/hourly_update.py, whole"].append(_run(folder, update))
            next(arrivals)
            parts.append(_watched(folder, update))
            timed["flows/hourly_update.py --help"].append(_run(folder, ["flows/hourly_update.py", "--help"]))
            timed["flows/status.py"].append(_run(folder, ["flows/status.py", "--state-dir", str(folder / "state")]))
        learned = _rows_learned(folder / "state/models/hourly")
    assert len(learned) == 2 * options.repetitions + 1, f"{len(learned)} updates of {2 * options.repetitions + 1} were made"
    print(f"rows learned an update: {statistics.median(learned[1:]):,.0f}; held-out rows are learned with the next")
    _print_parts(parts)
    ours = statistics.median(sum(wall for (whose, _), (wall, _) in part.items() if whose == "ours") for part in parts)
    for name, runs in timed.items():
        wall, cpu = (statistics.median(run[kind] for run in runs) for kind in (0, 1))
        least, most = min(run[0] for run in runs), max(run[0] for run in runs)
        print(f"{name + ':':32} {wall:5.1f} s ({least:.1f} to {most:.1f}), {cpu:5.1f} CPU s of all its processes")
    print(f"{'of the whole process, ours:':32} {ours:5.1f} s")
    print(f"wanted: at most {WANTED_SECONDS:.0f} s for the whole process, at most {WANTED_OURS_SECONDS:.0f} s of it ours")


def _rows_learned(model_dir: Path) -> list[int]:
    from pipeline.publishing.report import read_history

    return [int(record["rows_learned"]) for record in read_history(model_dir)]


def _arrivals(folder: Path, hours: int, rows: int, seed: int) -> Iterator[None]:
    """Puts one more hour into the landing folder, each time that it is asked to."""
    from pipeline.data.synthetic import SyntheticConfig, write_landing

    stream = SyntheticConfig(seed=seed, hours=hours, rows_per_hour=rows, traffic_ratio=1.0, late_share=0.0, duplicate_share=0.0)
    files = sorted(write_landing(stream, folder / "to come"))
    (folder / "landing").mkdir()
    for file in files:
        shutil.move(file, folder / "landing")
        yield


def _run(folder: Path, command: list[str]) -> tuple[float, float]:
    """Seconds of a process by the wall, and of CPU, its children's included."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(folder / "prefect")}
    environment["STARTED"] = repr(time.time())
    started, cpu = time.perf_counter(), _cpu_of_children()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started, _cpu_of_children() - cpu


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _watched(folder: Path, command: list[str]) -> Parts:
    answer = folder / "seconds.json"
    total, _ = _run(folder, ["benchmarks/whose_seconds.py", str(answer), *command])
    parts = {(whose, part): (wall, cpu) for whose, part, wall, cpu in json.loads(answer.read_text())}
    parts["python", "end"] = (total - sum(wall for wall, _ in parts.values()), 0.0)
    return parts


def _print_parts(parts: list[Parts]) -> None:
    owners = {owner for part in parts for owner in part}
    medians = {
        owner: [statistics.median(part.get(owner, (0.0, 0.0))[kind] for part in parts) for kind in (0, 1)] for owner in owners
    }
    groups: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for (whose, part), (wall, cpu) in medians.items():
        imported = part == "import" and whose != "ours"
        groups["imports of libraries" if imported else whose].append((wall, cpu, whose if imported else part))
    print(f"{'s':>8} {'CPU s':>8}  whose")
    for group, rows in sorted(groups.items(), key=lambda item: -sum(row[0] for row in item[1])):
        print(f"{sum(row[0] for row in rows):8.2f} {sum(row[1] for row in rows):8.2f}  {group}")
        large = [row for row in rows if row[0] >= SMALL_SECONDS]
        small = [row for row in rows if row[0] < SMALL_SECONDS]
        if small:
            large.append((sum(row[0] for row in small), sum(row[1] for row in small), f"{len(small)} smaller ones"))
        for wall, cpu, part in sorted(large, reverse=True):
            print(f"{wall:8.2f} {cpu:8.2f}      {part}")


if __name__ == "__main__":
    main()
