"""`torch.compile` around the dense network, where it is asked for and the machine can.

Enters: a network. Leaves: something that is called like it, and counts how many times it was compiled.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

Backend = Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class Compiled:
    """A dense network, compiled or as it is."""

    def __init__(self, net: nn.Module, backend: Backend | None) -> None:
        self.compilations = 0
        """Of graphs; static shapes need one."""
        self.compiles = backend is not None
        self.note = ""
        """Why it is not compiled although it was asked for."""
        self._backend = backend
        self._call: Callable[..., Any] = torch.compile(net, backend=self._count, dynamic=False) if backend else net

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        logits_B: torch.Tensor = self._call(*inputs)
        return logits_B

    def _count(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.compilations += 1
        assert self._backend is not None
        return self._backend(graph, inputs)


def compiled(net: nn.Module, *, asked: bool) -> Compiled:
    """The network through inductor; as it is without a C++ compiler, with a note."""
    if not asked:
        return Compiled(net, None)
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        uncompiled = Compiled(net, None)
        uncompiled.note = "training.compile_dense_network found no C++ compiler; the dense network ran as it is"
        log.warning("%s", uncompiled.note)
        return uncompiled
    inductor: Any = torch._dynamo.lookup_backend("inductor")
    return Compiled(net, inductor)
