"""Measures our model against transformers' own DeepSeek-V3, and our sampler against lm-eval's `hf` model, on the same
weights, LoRA on experts against PEFT's own, the grader's verdicts a second, what the traces of a teacher cost and what
cleaning them takes; prints the table.

    make bench                     every row
    make bench ROWS="decode load"  the rows whose name contains one of these words

A timed row runs both sides alternately in this process and gives the median of each and of the pairwise ratios, so
that a machine whose speed drifts does not decide. Where CUDA is present the GPU rows are added, and the table says
which GPU. The goals are those the package was built to reach.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import adapters
import batching
import distillation
import filters
import grading
import parallel
import quantization
import rows
import sampling
import speculation
import torch
import training


@dataclass(frozen=True)
class Timing:
    """Medians in seconds of two alternated calls, and the median of theirs / ours."""

    ours: float
    theirs: float
    ratio: float


def alternate(ours: Callable[[], object], theirs: Callable[[], object], runs: int = 7, warmup: int = 2) -> Timing:
    """Times the two calls in turn, ours first."""
    pairs = []
    for run in range(warmup + runs):
        pair = []
        for call in (ours, theirs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pair.append(time.perf_counter() - start)
        if run >= warmup:
            pairs.append(pair)
    ours_s, theirs_s = zip(*pairs, strict=True)
    return Timing(median(ours_s), median(theirs_s), median(b / a for a, b in pairs))


def main(words: list[str]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}\n")
    print(f"{'row':58} {'ours':>12} {'theirs':>13} {'ratio':>8}  goal")
    modules = (
        rows,
        batching,
        speculation,
        adapters,
        sampling,
        grading,
        distillation,
        filters,
        parallel,
        training,
        quantization,
    )
    for name, measure in [row for module in modules for row in module.ROWS.items()]:
        if words and not any(word in name for word in words):
            continue
        for row in measure(alternate):
            name = row.name if len(row.name) <= 58 else f"{row.name}\n{'':58}"
            print(f"{name:58} {row.ours:>12} {row.theirs:>13} {row.ratio:>8}  {row.goal}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
