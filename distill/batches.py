"""The order of rows in which little is padding."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 50  # steps whose rows are sorted together: enough for equal lengths, few enough to stay random


class ByLength(Sampler[int]):
    """Indices of rows so that the rows of each optimizer step are of about one length.

    The order is a function of seed and epoch. transformers' own sampler draws from the process's global noise instead,
    so a resumed training would read other batches than an uninterrupted one, and two processes different orders.
    Within each pool of random rows steps go from long to short, then all steps are shuffled; the longest comes first,
    so that memory runs out at once or never.

    >>> rows = list(ByLength([5, 1, 4, 2, 3], rows_per_step=2, seed=0))
    >>> [sorted([5, 1, 4, 2, 3][row] for row in rows[step : step + 2]) for step in (0, 2, 4)]
    [[4, 5], [2, 3], [1]]
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int) -> None:
        self.lengths, self.rows_per_step, self.seed = list(lengths), rows_per_step, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """accelerate calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        noise = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=noise).tolist()
        size = POOL * self.rows_per_step
        steps = []
        for start in range(0, len(order), size):
            pool = sorted(order[start : start + size], key=self.lengths.__getitem__, reverse=True)
            steps += [pool[at : at + self.rows_per_step] for at in range(0, len(pool), self.rows_per_step)]
        # The one that is not full stays last: the trainer cuts the order into steps by number.
        last = [steps.pop()] if steps and len(steps[-1]) < self.rows_per_step else []
        steps = [steps[at] for at in torch.randperm(len(steps), generator=noise).tolist()]
        if steps:
            longest = max(range(len(steps)), key=lambda at: self.lengths[steps[at][0]])
            steps.insert(0, steps.pop(longest))
        for step in steps + last:
            yield from step
