"""Logits of DeepSeek's official code (tests/golden), on both attention paths, at once and token by token."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import modeling_deepseek  # noqa: F401  # the Auto classes give its classes

GOLDEN = Path(__file__).parents[1] / "golden"
POSITIONS = [0, 6, *range(31, 40)]
TOLERANCE = 2e-5  # of the task: float32 against float32, logits up to 6


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("path", ["expanded", "absorbed", "auto"])
@pytest.mark.parametrize("name", ["v3", "v2_lite"])
def test_logits_of_the_official_code(name, path, implementation):
    model = AutoModelForCausalLM.from_pretrained(
        GOLDEN / name, dtype=torch.float32, attn_implementation=implementation, mla_path=path
    )
    assert type(model).__module__ == "modeling_deepseek.modeling_deepseek"
    expected = load_file(GOLDEN / name / "expected.safetensors")
    input_ids = expected["input_ids"]

    with torch.no_grad():
        at_once = model(input_ids).logits
        cache, steps = None, []
        for position in range(input_ids.shape[1]):
            output = model(input_ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)

    for logits in (at_once, torch.cat(steps, dim=1)):
        difference = (logits[:, POSITIONS] - expected["logits"]).abs().max().item()
        assert difference < TOLERANCE
