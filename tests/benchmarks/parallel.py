"""Rows of the benchmark table: what lies on each of two ranks, beside transformers' own class of the same model."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rows import Row

from tests import spread
from tests.ranks import on_ranks
from tests.tiny import tiny_model


def shares(alternate) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Heads and ranks of V3's proportions; the MTP module is left out, since theirs has none.
        tiny_model(num_nextn_predict_layers=0, num_attention_heads=16, hidden_size=128).save_pretrained(folder / "v3")
        for layout, label in (("tp", "tensor"), ("tp+ep", "tensor and expert"), ("fsdp", "FSDP2")):
            found = []
            for family in ("ours", "theirs"):
                on_ranks(folder, spread.bytes_on_rank, layout, family)
                found.append(json.loads((folder / f"{family}-{layout}.json").read_text()))
            ours, theirs = found
            assert ours["gap"] <= 1e-5, ours
            for part in ("attention", "model"):
                text = f"{part} on each of 2 ranks, {label} parallel"
                ratio = f"{theirs[part] / ours[part]:.2f}x"
                yield Row(text, f"{ours[part]:.1%}", f"{theirs[part]:.1%}", ratio, "logits to 1e-5")


ROWS = {"parallel": shares}
