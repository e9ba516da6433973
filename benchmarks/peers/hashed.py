"""Hashed one-hot rows with crosses and dense columns, for the linear peers."""

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from data_schemas.dataset import DatasetSpec
from data_schemas.hashing import combine_hashes, mix64, rows_of
from peers.contender import Hour
from pipeline.data.encode import num_dense_columns

WIDTH = 2**22
"""Columns that ids and crosses are hashed into; dense columns follow."""

Cross = tuple[str, ...]


def scale_choices(spec: DatasetSpec) -> list[str]:
    """Scales of the dense columns to choose from; one where there are none."""
    return ["raw", "normalised"] if num_dense_columns(spec) else ["raw"]


def cross_choices(spec: DatasetSpec) -> list[list[Cross]]:
    """Sets of crosses to choose from: those that the TOML declares, the user's with each id, every pair of ids."""
    names = [feature.name for feature in spec.logged_categorical()]
    single = [feature.name for feature in spec.logged_categorical() if not feature.many]
    of_user: list[Cross] = [(str(spec.user), name) for name in single if spec.user and name != spec.user]
    pairs: list[Cross] = [(first, second) for place, first in enumerate(names) for second in names[place + 1 :]]
    choices: list[list[Cross]] = []
    for choice in ([*spec.crosses], _KNOWN_GOOD.get(spec.name, []), of_user, pairs):
        if choice and choice not in choices:
            choices.append(choice)
    return choices


_KNOWN_GOOD: dict[str, list[Cross]] = {
    "synthetic": [("country", "author_id"), ("country", "category"), ("device", "placement"), ("country", "tags")],
}
"""Found best for Vowpal Wabbit by `benchmarks/oracle.py`."""


def one_hot(hour: Hour, crosses: Sequence[Cross], scale: str) -> sparse.csr_matrix:
    """`[R, WIDTH + N]`: 1 for each id, id of a list, and cross of single ids; then the dense columns on `scale`."""
    ids = dict(hour.examples.single_ids)
    for cross in crosses:
        if all(name in ids for name in cross):
            first, second, *more = (ids[name] for name in cross)
            crossed = combine_hashes(first, second)
            for other in more:
                crossed = combine_hashes(crossed, other)
            ids[" x ".join(cross)] = crossed
    columns_RK = np.stack([_columns(name, values) for name, values in ids.items()], axis=1)
    num_rows, num_keys = columns_RK.shape
    offsets = np.arange(num_rows + 1) * num_keys
    shape = (num_rows, WIDTH)
    hashed = sparse.csr_matrix((np.ones(columns_RK.size, np.float32), columns_RK.ravel(), offsets), shape=shape)
    for name, lists in hour.examples.list_ids.items():
        columns_V = _columns(name, lists.values_V)
        hashed = hashed + sparse.csr_matrix((np.ones(len(columns_V), np.float32), columns_V, lists.offsets), shape=shape)
    return sparse.hstack([hashed, sparse.csr_matrix(hour.dense_columns(scale))], format="csr")


def _columns(name: str, ids: np.ndarray) -> np.ndarray:
    salt = np.uint64(int.from_bytes(name.encode()[-8:], "little"))
    return rows_of(mix64(ids ^ mix64(np.array([salt]))[0]), WIDTH)
