"""Tiny models that really route, for every test: top-k < experts that the groups allow < all experts."""

import torch

from modeling_deepseek import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

FAMILIES = {
    "v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
}


def tiny_config(family: str = "v3", **overrides):
    """The preset `tiny-v2` or `tiny-v3`, with weights spread wide enough (std 0.2) to route decisively."""
    config_class, _ = FAMILIES[family]
    return config_class.from_preset(f"tiny-{family}", **{"initializer_range": 0.2, **overrides})


def tiny_model(family: str = "v3", seed: int = 0, attn_implementation: str = "sdpa", **overrides):
    """A tiny causal LM in eval mode, float32, with correction biases that are not zero."""
    _, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class._from_config(tiny_config(family, **overrides), attn_implementation=attn_implementation)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return model.eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Random token ids (batch, length) that avoid the special ids 0 and 1."""
    return torch.randint(2, 256, (batch, length), generator=torch.Generator().manual_seed(seed))
