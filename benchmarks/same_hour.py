"""Whether rows of other users in the same hour can judge what a model has learned in it.

In:  the hours of a landing folder.
Out: the mean AUC over hours with which an item's click rate, shrunk towards the hour's by five rows, ranks the rows of a tenth
     of the users: counted over the other users in the same hour, and over all users in the hour before. Below .5 the same hour
     speaks against what is true: where negatives were drawn, an item that one user clicked stands with all others as a
     negative only, so that users who are left out look like the opposite of those who are not.

    python benchmarks/same_hour.py brunch --landing ../shared/data/brunch/impressions [--hours 48]
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from alarms import hours_of
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from data_schemas.dataset import load_spec
from data_schemas.examples import Examples
from pipeline.evaluation.paired import held_out

SHRINK_ROWS = 5


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("dataset")
    cli.add_argument("--landing", required=True)
    cli.add_argument("--hours", type=int, default=48)
    options = cli.parse_args()
    same, before, previous = [], [], None
    with tempfile.TemporaryDirectory() as temporary:
        for hour, examples in islice(hours_of(options.landing, load_spec(options.dataset), Path(temporary)), options.hours):
            chosen = held_out(examples.user_R, share=0.1, salt=[hour])
            judged = examples.take(np.flatnonzero(chosen))
            if previous is not None and 0 < judged.labels_R.mean() < 1:
                same.append(_auc(examples.take(np.flatnonzero(~chosen)), judged))
                before.append(_auc(previous, judged))
            previous = examples
    table = Table("click rates of items from", "hours", "mean AUC")
    table.add_row("other users, the same hour", str(len(same)), f"{np.mean(same):.3f}")
    table.add_row("all users, the hour before", str(len(before)), f"{np.mean(before):.3f}")
    Console(width=120).print(table)


def _auc(counted: Examples, judged: Examples) -> float:
    items, place = np.unique(counted.item_R, return_inverse=True)
    clicks, rows = np.bincount(place, weights=counted.labels_R), np.bincount(place)
    rate = float(counted.labels_R.mean())
    rates = (clicks + SHRINK_ROWS * rate) / (rows + SHRINK_ROWS)
    at = np.minimum(np.searchsorted(items, judged.item_R), len(items) - 1)
    scores = np.where(items[at] == judged.item_R, rates[at], rate)
    return float(roc_auc_score(judged.labels_R, scores))


if __name__ == "__main__":
    main()
