"""What parameters of experiments must be to each other: refused before anything is run."""

from collections.abc import Sequence

from data_schemas.errors import ConfigError


def need_seeds(seeds: int) -> None:
    """An interval over seeds needs two.

    Raises:
        ConfigError: fewer.
    """
    if seeds < 2:
        raise ConfigError(f"seeds must be at least 2, for intervals; got {seeds}")


def need_batches(batch_sizes: Sequence[int], num_rows: int, *, least: int = 1) -> None:
    """Each batch is filled at least once in a pass.

    Args:
        least: number of batch sizes that are compared at least.

    Raises:
        ConfigError: too few batch sizes, or one with more rows than there are.
    """
    if len(batch_sizes) < least:
        raise ConfigError(f"batch_sizes must have at least {least} values, got {len(batch_sizes)}")
    if max(batch_sizes) > num_rows:
        raise ConfigError(f"a batch of {max(batch_sizes)} rows is never filled by {num_rows}; use a smaller batch or more rows")
