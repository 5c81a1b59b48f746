"""Rotary positions: frequencies (plain, linear, YaRN) and the rotation, as pure functions.

Legend: B batch, S positions, H heads, R = qk_rope_head_dim.

The rotation runs in float32 whatever the dtype, as in the official code. DeepSeek's weights lay the rotary values out
in pairs (x0, x1), (x2, x3), ...; the rotated vector is written as [all firsts, all seconds], a permutation that query
and key share, so that no score changes.
"""

import math

import torch


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1, and 1 for a factor that stretches nothing (YaRN, arXiv 2309.00071, 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(rope: dict, dim: int) -> torch.Tensor:
    """Angles per position, (dim / 2,) float32, for `config.rope_parameters` of type default, linear or yarn.

    YaRN leaves fast dimensions alone, divides slow ones by `factor` and blends in between (`beta_fast`, `beta_slow`:
    rotations over the original context where the blend begins and ends).
    """
    theta = rope["rope_theta"]
    freqs_P = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    rope_type = rope.get("rope_type", "default")
    if rope_type == "default":
        return freqs_P
    factor = rope["factor"]
    if rope_type == "linear":
        return freqs_P / factor

    original_length = rope["original_max_position_embeddings"]

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(rope.get("beta_fast", 32))), 0)
    high = min(math.ceil(dimension_of(rope.get("beta_slow", 1))), dim - 1)
    width = high - low if high != low else 0.001  # a ramp of no width would divide by zero
    # In the official code's order, to the last bit: a far position multiplies the difference.
    smooth_P = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return freqs_P / factor * (1 - smooth_P) + freqs_P * smooth_P


def rope_magnitudes(rope: dict) -> tuple[float, float]:
    """(what multiplies cos and sin, what multiplies the softmax scale) under YaRN; (1, 1) otherwise.

    With both `mscale` and `mscale_all_dim` (every released file; equal there) the released modelling code decides:
    the ratio of the two goes to cos and sin, the square of the latter to the softmax. With `mscale_all_dim` missing,
    the official inference code has but one factor, `mscale`, 1 by default, and its square scales the softmax.
    transformers scales cos and sin there instead.
    """
    if rope.get("rope_type", "default") != "yarn":
        return 1.0, 1.0
    factor, mscale, all_dim = rope["factor"], rope.get("mscale"), rope.get("mscale_all_dim")
    part = yarn_mscale(factor, 1.0 if mscale is None else mscale)
    if not all_dim:
        return 1.0, part**2
    whole = yarn_mscale(factor, all_dim)
    return part / whole, whole**2


def rope_angles(
    position_ids_BS: torch.Tensor, freqs_P: torch.Tensor, magnitude: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position's angles, each (B, S, R/2) float32."""
    angles_BSP = position_ids_BS[..., None].float() * freqs_P
    return angles_BSP.cos() * magnitude, angles_BSP.sin() * magnitude


def apply_rope(x_BHSR: torch.Tensor, cos_BSP: torch.Tensor, sin_BSP: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotates each pair of the last axis by its position's angle; same shape and dtype as `x_BHSR`.

    `interleaved` says where a pair lies in the weights: (2i, 2i+1), or (i, i + R/2). With R = 4 and angle t, the
    interleaved (a, b, c, d) becomes (a cos t0 - b sin t0, c cos t1 - d sin t1, b cos t0 + a sin t0,
    d cos t1 + c sin t1).
    """
    x = x_BHSR.float()
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    cos, sin = cos_BSP.unsqueeze(1), sin_BSP.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHSR.dtype)
