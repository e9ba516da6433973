"""One process at a time in a model's folder.

Enters: the folder. Leaves: the folder held, until the block or the process ends, however it ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from data_schemas.errors import UpdateInProgress


@contextmanager
def alone(model_dir: Path) -> Iterator[None]:
    """Holds the model's lock; the kernel lets go of it when the process ends, however it ends.

    Raises:
        UpdateInProgress: another process holds it.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(model_dir / "lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout as error:
        raise UpdateInProgress(
            f"another update of the model in {model_dir} is running; wait for it, or use another model_name"
        ) from error
