"""Which arithmetic the dense network is fastest in, on this machine and for this net.

bf16 halves the memory traffic but is slower for small networks on some processors, so it is measured, not assumed.
"""

import statistics
import time
from collections.abc import Callable

import torch

from models.ctr import DenseNet
from pipeline.config import Precision
from pipeline.training.learner import Arithmetic

ROUNDS = 7


def choose_precision(
    asked: Precision,
    net: DenseNet,
    *,
    deep_width: int,
    wide_width: int,
    num_dense: int,
    rows: int,
    device: torch.device,
) -> Arithmetic:
    """`asked` itself, or for `auto` the fastest of fp32 and bf16 by interleaved medians of forward and backward.

    fp16 is never chosen by itself: it needs loss scaling, and gains nothing over bf16 where both are supported.
    """
    if asked != "auto":
        return asked
    deep_BS = torch.zeros(rows, deep_width, device=device, requires_grad=True)
    wide_BW = torch.zeros(rows, wide_width, device=device)
    dense_BN = torch.zeros(rows, num_dense, device=device)

    def one_pass(dtype: torch.dtype | None) -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits_B = net(deep_BS, wide_BW, dense_BN)
        logits_B.sum().backward()
        net.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds: dict[Arithmetic, list[float]] = {"fp32": [], "bf16": []}
    dtypes: dict[Arithmetic, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
    for round_ in range(ROUNDS + 1):
        for name, dtype in dtypes.items():
            elapsed = _timed(lambda dtype=dtype: one_pass(dtype))  # type: ignore[misc]
            if round_ > 0:
                seconds[name].append(elapsed)
    return min(seconds, key=lambda name: statistics.median(seconds[name]))


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
