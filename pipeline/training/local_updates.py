"""When processes share what they learn about the dense network: every step, every k steps, or at the end of a pass.

Enters: gradients before a dense step, and everything that the next one depends on after it. Leaves: the same in all processes
each time they have shared; in between each has its own.

Shared every step, it is one step on the whole batch. Otherwise each process steps by the mean gradient of its own rows, and
now and then all go on from the mean of their weights (local SGD, Stich 2019, algorithm 1; once at the end: Zinkevich et al.
2010). The optimizer's moments are averaged with the weights. Tables are cut over the processes and exist once: they step with
the gradients of all processes, whatever is shared here, each taken at the dense weights of the process that has the row.
"""

from collections.abc import Sequence

import torch

from pipeline.training.processes import Processes


class Sharing:
    """Of one model's dense part."""

    def __init__(self, every: int, processes: Processes) -> None:
        """`every`: 1 for synchronous steps, k for local ones, 0 for local ones all along a pass."""
        self._every = every
        self._processes = processes
        self.apart = False
        """Whether processes have stepped since they shared last."""

    @property
    def local(self) -> bool:
        """Whether processes step by themselves."""
        return self._every != 1 and self._processes.count > 1

    def share_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Before a step: those of the whole batch, in one exchange; with local steps, those of this process as if all rows
        were like its own, and no exchange."""
        if not self.local:
            self._processes.sum_gradients(parameters)
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(self._processes.count)

    def stepped(self, steps: int, state: Sequence[torch.Tensor]) -> None:
        """After step number `steps`, counted from 1: shares `state` where it is time."""
        self.apart = self.local
        if self._every and steps % self._every == 0:
            self.share(state)

    def share(self, state: Sequence[torch.Tensor]) -> None:
        """Puts the mean of all processes in the place of each tensor, where they may differ."""
        if self.apart:
            self._processes.average(state)
            self.apart = False

    def mean(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What sharing now would give, without doing so; all processes call it."""
        if not self.apart:
            return tensors
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        self._processes.average(list(copies.values()))
        return copies
