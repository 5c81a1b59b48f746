"""Rotary positions against values computed by hand and the official code's formulas."""

import math

import pytest
import torch

from modeling_deepseek.layers import DeepseekRotaryEmbedding
from modeling_deepseek.rope import apply_rope, rope_angles, rope_frequencies, rope_magnitudes, yarn_mscale
from tests.tiny import tiny_config, tiny_model, tokens

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}


def official_frequencies(rope, dim):
    """`precompute_freqs_cis` of DeepSeek-V3's inference/model.py, before it is spread over positions."""
    base, factor, seq_len = rope["rope_theta"], rope["factor"], rope["original_max_position_embeddings"]

    def find_correction_dim(num_rotations):
        return dim * math.log(seq_len / (num_rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(find_correction_dim(rope["beta_fast"])), 0)
    high = min(math.ceil(find_correction_dim(rope["beta_slow"])), dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    smooth = 1 - ramp
    freqs = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    return freqs / factor * (1 - smooth) + freqs * smooth


def official_apply(x, freqs, position_ids):
    """`apply_rotary_emb` of the same file: pairs (2i, 2i + 1) times e^(i angle). x is (B, S, H, R)."""
    angles = position_ids[0].float()[:, None] * freqs
    freqs_cis = torch.polar(torch.ones_like(angles), angles).view(1, x.shape[1], 1, -1)
    return torch.view_as_real(torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)) * freqs_cis).flatten(3)


def test_frequencies_by_hand():
    """theta 10000 over 8 values: 1, 1/10, 1/100, 1/1000.

    YaRN with 32 and 1 rotations over 4096 positions: 8 ln(4096 / (32 * 2 pi)) / (2 ln 10000) = 1.31, floor 1, and
    8 ln(4096 / 2 pi) / (2 ln 10000) = 2.81, ceil 3. So the ramp from "as it is" to "divided by the factor" is
    0, 0, 1/2, 1.
    """
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    for rope, expected in (
        (plain, [1, 0.1, 0.01, 0.001]),
        (linear, [0.25, 0.025, 0.0025, 0.00025]),
        ({**YARN, "factor": 4.0}, [1, 0.1, 0.00625, 0.00025]),
    ):
        torch.testing.assert_close(rope_frequencies(rope, 8), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "rope",
    [
        YARN,  # V2, V3, R1
        {**YARN, "rope_theta": 50000.0, "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},  # Kimi-K2: a ramp of one
        {**YARN, "original_max_position_embeddings": 4},  # both ends below the first dimension
        {**YARN, "beta_fast": 4096 / (2 * math.pi), "beta_slow": 4096 / (2 * math.pi)},  # a ramp of no width
    ],
    ids=["v3", "kimi-k2", "short", "no width"],
)
@pytest.mark.parametrize("dim", [8, 64])
def test_yarn_frequencies_are_the_official_ones(rope, dim):
    torch.testing.assert_close(rope_frequencies(rope, dim), official_frequencies(rope, dim), rtol=0, atol=0)


def test_yarn_blends_from_32_to_1_rotations_where_unsaid():
    unsaid = {name: value for name, value in YARN.items() if not name.startswith("beta")}
    assert torch.equal(rope_frequencies(unsaid, 64), rope_frequencies(YARN, 64))


# ln 40 = 3.6888795: 0.1 ln 40 + 1 = 1.3688879 and 0.0707 ln 40 + 1 = 1.2608038; their squares 1.8738542, 1.5896262.
@pytest.mark.parametrize(
    ("rope", "cos_sin", "softmax"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1, 1.8738542),  # V3
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1, 1.5896262),  # V2
        ({"mscale": 1.0, "mscale_all_dim": 0.707}, 1.3688879 / 1.2608038, 1.5896262),
        ({"mscale_all_dim": 0.707}, 1.3688879 / 1.2608038, 1.5896262),
        ({}, 1, 1.8738542),  # the official inference code's mscale is 1; transformers would scale cos and sin
        ({"mscale": 0.707}, 1, 1.5896262),
        ({"mscale": 0.707, "mscale_all_dim": 0}, 1, 1.5896262),  # as the Hub's code spells "none"
        ({"mscale": None, "mscale_all_dim": None}, 1, 1.8738542),
        ({"factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}, 1, 1),
        ({"rope_type": "linear"}, 1, 1),
        ({"rope_type": "default"}, 1, 1),
    ],
    ids=str,
)
def test_magnitudes(rope, cos_sin, softmax):
    actual = rope_magnitudes({**YARN, **rope})
    assert actual == pytest.approx((cos_sin, softmax), rel=1e-6)


def test_yarn_mscale():
    assert yarn_mscale(math.e**2, 0.5) == pytest.approx(1.1)
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0


@pytest.mark.parametrize(
    ("rope_scaling", "scaling", "magnitude"),
    [
        (None, 0.25, 1),
        ({"type": "yarn", "factor": 40.0}, 0.25 * 1.8738542, 1),
        ({"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707}, 0.25 * 1.5896262, 1.0857264),
        ({"type": "linear", "factor": 40.0}, 0.25, 1),
    ],
    ids=str,
)
def test_model_uses_both_magnitudes(rope_scaling, scaling, magnitude):
    """(12 + 4)^-0.5 = 0.25, times what YaRN gives to the softmax."""
    config = {"qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "num_hidden_layers": 1, "first_k_dense_replace": 1}
    model = tiny_model(**config, rope_scaling=rope_scaling, num_nextn_predict_layers=0)
    assert model.model.layers[0].self_attn.scaling == pytest.approx(scaling, rel=1e-6)
    cos, sin = model.model.rotary_emb(torch.tensor([[0, 3]]))
    assert cos[0, 0].tolist() == pytest.approx([magnitude] * 2, rel=1e-6)
    assert (cos**2 + sin**2).sqrt()[0, 1].tolist() == pytest.approx([magnitude] * 2, rel=1e-6)


def test_rotation_by_hand():
    """Angles of 90 and 0 degrees on (1, 2, 3, 4). Interleaved, the pairs are (1, 2) and (3, 4) and become (-2, 1) and
    (3, 4), written firsts first; otherwise (1, 3) and (2, 4), which become (-3, 1) and (2, 4)."""
    x = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([[[0.0, 1]]]), torch.tensor([[[1.0, 0]]])
    assert apply_rope(x, cos, sin, interleaved=True).flatten().tolist() == [-2, 3, 1, 4]
    assert apply_rope(x, cos, sin, interleaved=False).flatten().tolist() == [-3, 2, 1, 4]


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 10000.0, "factor": 1.0}, YARN], ids=str)
def test_rotation_is_the_official_one(rope):
    """The rotated vector is a permutation of the official one (firsts, then seconds), so that scores are equal.
    Positions up to the longest context: angles are taken in float32, as there."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 5, 3, 64, generator=generator).unbind(0)  # (B, S, H, R)
    position_ids = torch.tensor([[0, 1, 77, 4096, 163839]])
    freqs = rope_frequencies(rope, 64)
    cos, sin = rope_angles(position_ids, freqs)
    official_freqs = freqs if rope["rope_type"] == "default" else official_frequencies(rope, 64)

    def ours(x):
        return apply_rope(x.transpose(1, 2), cos, sin, interleaved=True).transpose(1, 2)

    def official(x):
        return official_apply(x, official_freqs, position_ids)

    scores = [torch.einsum("bqhd,bkhd->bhqk", rotate(query), rotate(key)) for rotate in (ours, official)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-5)
    expected = torch.cat([official(query)[..., 0::2], official(query)[..., 1::2]], dim=-1)
    torch.testing.assert_close(ours(query), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_the_distance_alone(interleaved):
    query, key = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    freqs = rope_frequencies(YARN, 64)

    def score(query_position, key_position):
        rotated = [
            apply_rope(x, *rope_angles(torch.tensor([[position]]), freqs), interleaved)
            for x, position in ((query, query_position), (key, key_position))
        ]
        return (rotated[0] * rotated[1]).sum().item()

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 0.01


def test_layouts_are_the_same_model_on_permuted_weights():
    """`rope_interleave` says where the rotary pairs lie in the weights: moving the rows of every rotary projection from
    (0, 1), (2, 3), ... to firsts, then seconds, and clearing it, leaves the logits."""
    interleaved = tiny_model(rope_interleave=True, num_nextn_predict_layers=0)
    halves = tiny_model(rope_interleave=False, num_nextn_predict_layers=0)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    state = interleaved.state_dict()
    for name, weight in state.items():
        if name.endswith("q_b_proj.weight"):
            heads = weight.view(4, 24, -1)  # 16 without positions, 8 with
            state[name] = torch.cat([heads[:, :16], heads[:, 16:][:, order]], dim=1).flatten(0, 1)
        elif name.endswith("kv_a_proj_with_mqa.weight"):
            state[name] = torch.cat([weight[:32], weight[32:][order]])
    halves.load_state_dict(state)
    with torch.no_grad():
        expected, actual = interleaved(tokens()).logits, halves(tokens()).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_stay_in_float32(dtype):
    """bfloat16 knows no position between 4096 and 4112; casting a model must not touch its frequencies."""
    rotary = DeepseekRotaryEmbedding(tiny_config(rope_scaling={"type": "yarn", "factor": 40.0}))
    positions = torch.tensor([[0, 1, 4097]])
    expected = rotary(positions)
    cast = rotary.to(dtype)
    assert cast.inv_freq.dtype == torch.float32
    for actual, before in zip(cast(positions), expected, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, before)


def test_rotation_of_lower_precision_is_rounded_once():
    x = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    cos, sin = rope_angles(torch.tensor([[5, 6, 7]]), rope_frequencies(YARN, 8))
    rotated = apply_rope(x, cos, sin, interleaved=True)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rope(x.float(), cos, sin, interleaved=True).to(torch.bfloat16))
