"""One of each of transformers' cache classes, made to run on a machine with nothing but a CPU."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

MAX_LENGTH = 48
LOSSLESS = ["dynamic", "static", "offloaded", "offloaded_static"]
CACHES = [*LOSSLESS, "quanto", "fp8"]


def new_cache(name: str, config, monkeypatch: pytest.MonkeyPatch):
    """An empty cache of the class behind `name`, for up to `MAX_LENGTH` tokens where it needs a bound."""
    if name.startswith("offloaded"):
        # transformers asks CUDA for its stream, whatever the device. On CPU there is nothing to wait for; what the
        # classes hold and hand out is the same.
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: stream)
        monkeypatch.setattr(torch, "Stream", _NoStream)
    if name == "quanto":
        from optimum.quanto.library.extensions import get_extension

        # Otherwise quanto compiles its C++ version of this function for two minutes.
        monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=_unpack))
    return {
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config, max_cache_len=MAX_LENGTH),
        "offloaded": lambda: DynamicCache(config=config, offloading=True),
        "offloaded_static": lambda: StaticCache(config, max_cache_len=MAX_LENGTH, offloading=True),
        # Groups of 8 divide the tiny rope and rank; a window of 4 makes short sequences reach the quantised part.
        "quanto": lambda: QuantizedCache("quanto", config, q_group_size=8, residual_length=4),
        "fp8": lambda: QuantizedCache("fp8", config),
    }[name]()


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes that hold several values each, lowest bits first, to one value a byte, as quanto lays them out."""
    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])


class _NoStream:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def wait_stream(self, other):
        return None
