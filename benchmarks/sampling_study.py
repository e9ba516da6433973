"""What sampling costs and what it gives: thinned negatives, stratified batches, an item that bursts, speed.

    python benchmarks/sampling_study.py thinning [--ctr 0.05] [--hours 12] [--rows 40000] [--seeds 3]
    python benchmarks/sampling_study.py calibration [--hours 12] [--rows 20000] [--seeds 30]
    python benchmarks/sampling_study.py variance [--batches 2000]
    python benchmarks/sampling_study.py strata [--seeds 4]
    python benchmarks/sampling_study.py burst [--seeds 3] [--override training.sparse_step_rows=256]
    python benchmarks/sampling_study.py speed [--rows 3000000]

All streams are synthetic. Times are CPU time of one thread.
"""

import argparse

import torch
from sampled import burst, speed, thinning, variance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    numbers: dict[str, tuple[object, dict[str, float | str]]] = {
        "thinning": (thinning.run, {"ctr": 0.05, "hours": 12, "rows": 40_000, "seeds": 3}),
        "calibration": (thinning.run_calibration, {"ctr": 0.05, "hours": 12, "rows": 20_000, "seeds": 30}),
        "variance": (variance.run, {"batches": 2000, "batch_size": 256, "hours": 4, "rows": 60_000, "ctr": 0.05}),
        "strata": (thinning.run_strata, {"ctr": 0.05, "hours": 12, "rows": 40_000, "seeds": 4}),
        "burst": (burst.run, {"hours": 6, "rows": 30_000, "seeds": 3, "override": ""}),
        "speed": (speed.run, {"rows": 3_000_000, "repeats": 7}),
    }
    for name, (work, defaults) in numbers.items():
        command = commands.add_parser(name)
        command.set_defaults(work=work)
        for option, value in defaults.items():
            command.add_argument(f"--{option.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    options.pop("work")(**options)


if __name__ == "__main__":
    main()
