"""Routing, experts, the balance loss and the bias update, against tables computed by hand, against loops written out
here, and against transformers' own modules on the same weights."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers.models.deepseek_v2 import DeepseekV2Config as LibraryV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3 import DeepseekV3Config as LibraryV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from modeling_deepseek import DeepseekV3ForCausalLM, max_violation
from modeling_deepseek.moe import DeepseekGate, DeepseekMoE, affinities, load_balancing_loss, route, run_experts
from tests.tiny import FAMILIES, tiny_config, tiny_model, tokens

EXPERTS = ["eager", "grouped_mm", "batched_mm"]

# name: (scores, bias, method, other arguments, expected weight of each chosen expert). Groups are neighbours: with
# n_group 2 and four experts, {0, 1} and {2, 3}.
ROUTES = {
    "greedy": ([0.4, 0.1, 0.2, 0.3], None, "greedy", {"top_k": 2}, {0: 0.4, 3: 0.3}),
    "greedy knows no groups": (
        [0.4, 0.1, 0.2, 0.3], None, "greedy", {"top_k": 2, "n_group": 2, "topk_group": 1}, {0: 0.4, 3: 0.3},
    ),
    "normalised": ([0.4, 0.1, 0.2, 0.3], None, "greedy", {"top_k": 2, "norm_topk_prob": True}, {0: 4 / 7, 3: 3 / 7}),
    "scaled": ([0.4, 0.1, 0.2, 0.3], None, "greedy", {"top_k": 2, "scale": 16.0}, {0: 6.4, 3: 4.8}),
    "normalised, then scaled": (
        [0.4, 0.1, 0.2, 0.3], None, "greedy", {"top_k": 2, "norm_topk_prob": True, "scale": 3.5}, {0: 2.0, 3: 1.5},
    ),
    # Best of each pair: .30, .20, .25, so the pair with 2 and 3 is out although both beat expert 4.
    "V2 ranks groups by their best": (
        [0.30, 0.01, 0.20, 0.19, 0.05, 0.25], None,
        "group_limited_greedy", {"top_k": 3, "n_group": 3, "topk_group": 2}, {0: 0.30, 5: 0.25, 4: 0.05},
    ),
    # Sums of each pair: .31, .39, .30, so here the last pair is out.
    "V3 ranks groups by the sum of their two best": (
        [0.30, 0.01, 0.20, 0.19, 0.05, 0.25], [0.0] * 6,
        "noaux_tc", {"top_k": 3, "n_group": 3, "topk_group": 2}, {0: 0.30, 2: 0.20, 3: 0.19},
    ),
    # .7 + .3 < .6 + .5, although .7 is the best of all and .7 + .3 + .3 the largest sum.
    "two best, not all of the group": (
        [0.7, 0.3, 0.3, 0.6, 0.5, 0.0], [0.0] * 6,
        "noaux_tc", {"top_k": 2, "n_group": 2, "topk_group": 1}, {3: 0.6, 4: 0.5},
    ),
    "the bias chooses, the weights are without it": (
        [0.9, 0.8, 0.1], [0.0, -0.5, 0.3], "noaux_tc", {"top_k": 2}, {0: 0.9, 2: 0.1},
    ),
    "normalised without the bias": (
        [0.9, 0.8, 0.1], [0.0, -0.5, 0.3], "noaux_tc", {"top_k": 2, "norm_topk_prob": True}, {0: 0.9, 2: 0.1},
    ),
    # Sums with bias: .9 + .1 = 1.0 and .5 + .4 + .2 = 1.1
    "the bias moves the group": (
        [0.9, 0.1, 0.5, 0.4], [0.0, 0.0, 0.0, 0.2],
        "noaux_tc", {"top_k": 2, "n_group": 2, "topk_group": 1}, {2: 0.5, 3: 0.4},
    ),
    # Choice scores .5, -9, | -1, -1.5: the right group wins by -2.5 to -8.5, and keeps its token although all it has
    # is below zero, the value with which released code masks the other.
    "a group that lost is out, even against negative scores": (
        [0.5, 0.5, 0.5, 0.5], [0.0, -9.5, -1.5, -2.0],
        "noaux_tc", {"top_k": 2, "n_group": 2, "topk_group": 1}, {2: 0.5, 3: 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTES)
def test_route_by_hand(name):
    scores, bias, method, arguments, expected = ROUTES[name]
    bias_E = None if bias is None else torch.tensor(bias)
    weights_TK, indices_TK = route(torch.tensor([scores]), bias_E, topk_method=method, **arguments)
    found = dict(zip(indices_TK[0].tolist(), weights_TK[0].tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-6)


def test_tokens_are_routed_one_by_one():
    scores_TE = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    bias_E = torch.linspace(-0.3, 0.3, 8)
    arguments = {"top_k": 3, "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2, "norm_topk_prob": True}
    weights_TK, indices_TK = route(scores_TE, bias_E, **arguments)
    for token, scores_E in enumerate(scores_TE):
        alone = route(scores_E[None], bias_E, **arguments)
        assert sorted(alone[1][0].tolist()) == sorted(indices_TK[token].tolist())
        assert weights_TK[token].sum().item() == pytest.approx(1.0, abs=1e-6)


def test_affinities_have_the_precision_of_the_official_code():
    logits_TE = torch.tensor([[0.3, -1.7, 2.9]], dtype=torch.bfloat16)
    assert affinities(logits_TE, "sigmoid").dtype == torch.bfloat16
    softmax_TE = affinities(logits_TE, "softmax")
    assert softmax_TE.dtype == torch.float32
    weights = [math.exp(value) for value in logits_TE[0].tolist()]
    assert softmax_TE[0].tolist() == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-6)


def moe_layer(family="v3", seed=0, experts_implementation="eager", **overrides) -> DeepseekMoE:
    """A layer of the tiny models alone, its bias not zero."""
    config = tiny_config(family, **overrides)
    config._experts_implementation = experts_implementation
    torch.manual_seed(seed)
    layer = DeepseekMoE(config)
    if layer.gate.e_score_correction_bias is not None:
        layer.gate.e_score_correction_bias.normal_(std=0.1)
    return layer


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_projecting_by_hand_equals_the_loop(n_tokens):
    moe = moe_layer()
    hidden_TD = torch.randn(n_tokens, moe.gate.weight.shape[1], generator=torch.Generator().manual_seed(3))
    _, weights_TK, indices_TK = moe.gate(hidden_TD)
    experts = moe.experts
    by_hand = run_experts(experts.project, experts.act_fn, experts.num_experts, hidden_TD, indices_TK, weights_TK)
    assert (by_hand - experts(hidden_TD, indices_TK, weights_TK)).abs().max() < 1e-5 * by_hand.abs().max()


def hidden_states(batch=2, length=15, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, length, 64, generator=torch.Generator().manual_seed(3)).to(dtype)


LIBRARY = {
    "v2": (LibraryV2Config, DeepseekV2Moe, {}),
    "v2 greedy": (LibraryV2Config, DeepseekV2Moe, {"topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "v3": (LibraryV3Config, DeepseekV3MoE, {}),
    "v3 not normalised": (LibraryV3Config, DeepseekV3MoE, {"norm_topk_prob": False}),
    "v3 one group": (LibraryV3Config, DeepseekV3MoE, {"n_group": 1, "topk_group": 1}),
}


@pytest.mark.parametrize("implementation", EXPERTS)
@pytest.mark.parametrize("name", LIBRARY)
def test_layer_is_the_library_s(name, implementation):
    library_config_class, library_class, overrides = LIBRARY[name]
    ours = moe_layer(name[:2], experts_implementation=implementation, **overrides)
    config = tiny_config(name[:2], **overrides)
    library_config = library_config_class(**{
        field: getattr(config, field)
        for field in (
            "hidden_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
            "n_group", "topk_group", "topk_method", "norm_topk_prob", "routed_scaling_factor",
        )
    })  # fmt: skip
    library_config._experts_implementation = "eager"
    library = library_class(library_config)
    library.load_state_dict(ours.state_dict())

    inputs, library_inputs = (hidden_states().requires_grad_() for _ in range(2))
    output, _, _ = ours(inputs)
    expected = library(library_inputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    gradients = {"inputs": (inputs.grad, library_inputs.grad)}
    gradients |= {key: (value.grad, library.get_parameter(key).grad) for key, value in ours.named_parameters()}
    for key, (gradient, library_gradient) in gradients.items():
        difference = (gradient - library_gradient).abs().max() / library_gradient.abs().max()
        assert difference < 1e-5, key


@pytest.mark.parametrize("implementation", EXPERTS)
@pytest.mark.parametrize("skewed", [False, True])
def test_no_token_is_dropped(implementation, skewed):
    """Each token's K experts all act, with their weights, also where every token wants the same ones."""
    layer = moe_layer(experts_implementation=implementation)
    if skewed:
        layer.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9, 9, 0, 0, 0, 0, 0]))
    inputs = hidden_states()
    with torch.no_grad():
        output, _, indices_TK = layer(inputs)
        _, weights_TK, _ = layer.gate(inputs.flatten(0, 1))
        if skewed:
            assert set(indices_TK.flatten().tolist()) == {0, 1, 2}
        for token, x_D in enumerate(inputs.flatten(0, 1)):
            expected_D = layer.shared_experts(x_D)
            for weight, expert in zip(weights_TK[token], indices_TK[token], strict=True):
                gate_up = layer.experts.gate_up_proj[expert] @ x_D
                expected_D = expected_D + weight * (
                    layer.experts.down_proj[expert] @ (F.silu(gate_up[:32]) * gate_up[32:])
                )
            torch.testing.assert_close(output.flatten(0, 1)[token], expected_D, rtol=0, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_router_precision(autocast):
    """float32 by default, under autocast too; the official inference code's activation dtype on request."""
    hidden_TD = hidden_states(dtype=torch.bfloat16).flatten(0, 1)
    for setting, dtype in (("float32", torch.float32), ("activation", torch.bfloat16)):
        gate = moe_layer(router_logits_dtype=setting).gate
        gate = gate if autocast else gate.to(torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits_TE, weights_TK, _ = gate(hidden_TD)
        assert logits_TE.dtype == dtype
        assert weights_TK.dtype == dtype
        expected_TE = F.linear(hidden_TD.to(dtype), gate.weight.detach().to(dtype))
        assert torch.equal(logits_TE, expected_TE)


def test_no_shared_experts():
    with_shared = moe_layer()
    without = moe_layer(n_shared_experts=None)
    without.load_state_dict(with_shared.state_dict(), strict=False)
    assert not [name for name, _ in without.named_parameters() if "shared" in name]
    inputs = hidden_states()
    expected = with_shared(inputs)[0] - with_shared.shared_experts(inputs)
    torch.testing.assert_close(without(inputs)[0], expected, rtol=0, atol=1e-5)


def test_no_groups_means_one_group():
    inputs = hidden_states()
    without = moe_layer(n_group=None, topk_group=None)(inputs)
    with_one = moe_layer(n_group=1, topk_group=1)(inputs)
    assert torch.equal(without[0], with_one[0])
    assert not torch.equal(without[0], moe_layer(n_group=4, topk_group=2)(inputs)[0])  # which would be another model


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"first_k_dense_replace": 1, "moe_layer_freq": 1}, [1, 2, 3, 4, 5]),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, [2, 4]),
        ({"first_k_dense_replace": 0, "moe_layer_freq": 3}, [0, 3]),
        ({"n_routed_experts": None}, []),
        ({"n_routed_experts": None, "num_experts_per_tok": None}, []),
    ],
)
def test_which_layers_route(overrides, expected):
    """The MTP module is layer 5."""
    model = tiny_model(num_hidden_layers=5, **overrides).train()
    assert [index for index, layer in enumerate(model.model.layers) if layer.is_moe] == expected
    ids = tokens()
    output = model(ids, labels=ids, output_router_logits=True)
    output.loss.backward()
    assert len(output.router_logits) == len([index for index in expected if index < 5])
    assert (output.aux_loss is None) == (not expected)
    assert list(model.update_correction_bias()) == expected


# Balance loss

# Affinities of two experts for four tokens in two sequences, and the expert each chooses.
PROBABILITIES = [[0.8, 0.2], [0.6, 0.4], [0.5, 0.5], [0.1, 0.9]]
CHOICES = [[0], [0], [0], [1]]


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
def test_balance_loss_by_hand(scoring_func, padded):
    """First sequence: f = 2/2 * (2, 0), P = (.7, .3): 1.4. Second: f = (1, 1), P = (.3, .7): 1. Their mean: 1.2.
    All as one sequence: f = 2/4 * (3, 1), P = (.5, .5): 1."""
    probabilities_TE, indices_TK = torch.tensor(PROBABILITIES), torch.tensor(CHOICES)
    # Sigmoid affinities do not sum to one by themselves: halved, they must be normalised to the same.
    logits_TE = probabilities_TE.log() if scoring_func == "softmax" else torch.logit(probabilities_TE / 2)
    sequence_T, valid_T = torch.tensor([0, 0, 1, 1]), None
    if padded:  # a token of padding in each sequence, and a sequence of nothing else
        logits_TE = torch.cat([logits_TE, torch.tensor([[9.0, -9.0]] * 3)])
        indices_TK = torch.cat([indices_TK, torch.tensor([[0]] * 3)])
        sequence_T = torch.tensor([0, 0, 1, 1, 0, 1, 2])
        valid_T = torch.tensor([True] * 4 + [False] * 3)
    n_sequences = int(sequence_T.max()) + 1

    loss = load_balancing_loss(logits_TE, indices_TK, scoring_func, sequence_T, n_sequences, valid_T)
    assert loss.item() == pytest.approx(1.2, abs=1e-6)
    loss = load_balancing_loss(logits_TE, indices_TK, scoring_func, torch.zeros_like(sequence_T), 1, valid_T)
    assert loss.item() == pytest.approx(1.0, abs=1e-6)


def test_balance_loss_counts_every_choice():
    """E = 4, K = 2, three tokens of one sequence choose {0, 1}, {0, 2}, {0, 1}: f = 4/6 * (3, 2, 1, 0); with
    affinities (.4, .3, .2, .1) throughout the loss is 4/6 * (1.2 + .6 + .2) = 4/3."""
    logits_TE = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 3).log()
    indices_TK = torch.tensor([[0, 1], [2, 0], [1, 0]])
    loss = load_balancing_loss(logits_TE, indices_TK, "softmax", torch.zeros(3, dtype=torch.int64), 1)
    assert loss.item() == pytest.approx(4 / 3, abs=1e-6)


def test_balance_loss_of_balanced_routing_is_one():
    logits_TE = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    indices_TK = torch.tensor([[0, 1], [2, 3]] * 4)  # each expert four times
    for scoring_func in ("softmax", "sigmoid"):
        loss = load_balancing_loss(logits_TE, indices_TK, scoring_func, torch.zeros(8, dtype=torch.int64), 1)
        assert loss.item() == pytest.approx(1.0, abs=1e-6)


def test_balance_loss_lowers_the_affinity_of_the_busy_expert():
    logits_TE = torch.zeros(4, 2, requires_grad=True)
    loss = load_balancing_loss(logits_TE, torch.tensor(CHOICES), "softmax", torch.zeros(4, dtype=torch.int64), 1)
    loss.backward()
    assert (logits_TE.grad[:, 0] > 0).all()
    assert (logits_TE.grad[:, 1] < 0).all()


def balance_written_out(logits_TE: torch.Tensor, top_k: int) -> float:
    """Of one sequence routed greedily by softmax, as nested loops over V2's equations 23 to 25."""
    probabilities = logits_TE.softmax(-1).tolist()
    length, experts = len(probabilities), len(probabilities[0])
    total = 0.0
    for expert in range(experts):
        chosen = sum(sorted(row, reverse=True).index(row[expert]) < top_k for row in probabilities)
        mean = sum(row[expert] for row in probabilities) / length
        total += experts / (top_k * length) * chosen * mean
    return total


@pytest.mark.parametrize("seq_aux", [True, False])
@pytest.mark.parametrize("layout", ["rows", "padded", "packed"])
def test_balance_loss_of_a_model(layout, seq_aux):
    """Three documents of 4, 7 and 5 tokens, in rows, in padded rows (left and right), or packed in one."""
    model = tiny_model("v2", topk_method="greedy", n_group=1, topk_group=1, seq_aux=seq_aux)
    documents = [tokens(1, length, seed=length) for length in (4, 7, 5)]
    if layout == "rows":
        documents = [document[:, :4] for document in documents]
    router_logits = [model(document, output_router_logits=True).router_logits for document in documents]
    if seq_aux:
        expected = sum(balance_written_out(logits, 3) for layers in router_logits for logits in layers) / 3
    else:
        expected = sum(balance_written_out(torch.cat(layer), 3) for layer in zip(*router_logits, strict=True))

    if layout == "rows":
        output = model(torch.cat(documents), output_router_logits=True)
    elif layout == "packed":
        position_ids = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
        output = model(torch.cat(documents, 1), position_ids=position_ids, output_router_logits=True)
    else:
        pads = [(3, 0), (0, 0), (0, 2)]
        ids = torch.cat([F.pad(document, pad) for document, pad in zip(documents, pads, strict=True)])
        mask = torch.cat([F.pad(torch.ones_like(document), pad) for document, pad in zip(documents, pads, strict=True)])
        output = model(ids, attention_mask=mask, output_router_logits=True)
    assert output.aux_loss.item() == pytest.approx(expected, abs=1e-5)


# Load and bias


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([6, 2, 2, 2], 1.0), ([3, 3, 3, 3], 0.0), ([8, 0, 0, 0], 3.0), ([5, 5, 2, 0], 2 / 3)],
)
def test_max_violation_by_hand(counts, expected):
    assert max_violation(torch.tensor(counts)) == pytest.approx(expected, abs=1e-12)


def test_max_violation_of_no_load_is_nan():
    assert math.isnan(max_violation(torch.zeros(4, dtype=torch.int64)))


def gate_of_four(family="v3", **overrides) -> DeepseekGate:
    shape = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    return DeepseekGate(tiny_config(family, **shape, **overrides))


def test_bias_update_by_hand():
    """Five tokens choose, the last is padding: loads 4, 0, 2, 2 with mean 2. How far from it does not matter."""
    gate = gate_of_four(bias_update_speed=0.25)
    gate.e_score_correction_bias.copy_(torch.tensor([1.0, 1.0, 1.0, -1.0]))
    valid_T = torch.tensor([True, True, True, True, False])
    gate.record_load(torch.tensor([[0, 2], [0, 3], [2, 0], [3, 0], [1, 3]]), valid_T)
    counts_E = gate.update_correction_bias()
    assert counts_E.tolist() == [4, 0, 2, 2]
    assert counts_E.dtype == torch.int64
    assert gate.e_score_correction_bias.tolist() == [0.75, 1.25, 1.0, -1.0]

    # The counts have started anew: an update without load moves nothing.
    assert gate.update_correction_bias().tolist() == [0, 0, 0, 0]
    assert gate.e_score_correction_bias.tolist() == [0.75, 1.25, 1.0, -1.0]


def test_bias_update_adds_micro_batches():
    """Either micro-batch alone would move the bias; together they are balanced."""
    gate = gate_of_four()
    gate.record_load(torch.tensor([[0, 1], [0, 1]]), None)
    gate.record_load(torch.tensor([[2, 3], [2, 3]]), None)
    assert gate.update_correction_bias().tolist() == [2, 2, 2, 2]
    assert gate.e_score_correction_bias.tolist() == [0.0] * 4


@pytest.mark.parametrize("setting", [{"freeze_correction_bias": True}, {"bias_update_speed": 0}, "frozen router"])
def test_bias_update_can_be_off(setting):
    gate = gate_of_four() if setting == "frozen router" else gate_of_four(**setting)
    gate.weight.requires_grad_(setting != "frozen router")
    gate.e_score_correction_bias.fill_(0.5)
    gate.record_load(torch.tensor([[0, 1], [0, 1]]), None)
    assert gate.update_correction_bias().tolist() == [2, 2, 0, 0]
    assert gate.e_score_correction_bias.tolist() == [0.5] * 4
    assert gate.update_correction_bias().tolist() == [0] * 4


def test_gate_without_a_bias_reports_its_load():
    gate = gate_of_four("v2", topk_method="greedy")
    assert gate.e_score_correction_bias is None
    gate.record_load(torch.tensor([[0, 1], [0, 1]]), None)
    assert gate.update_correction_bias().tolist() == [2, 2, 0, 0]


def test_one_token_too_many_counts_beyond_float32():
    gate = gate_of_four(bias_update_speed=0.25)
    gate.tokens_per_expert = torch.tensor([2**24 + 1, 2**24 - 1, 2**24, 2**24])  # no float32 holds 2^24 + 1
    gate.update_correction_bias()
    assert gate.e_score_correction_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]


def test_bias_stays_float32_in_a_bfloat16_model(tmp_path):
    """In bfloat16, 1 + 0.001 is 1."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    models = {
        "cast": tiny_model().to(torch.bfloat16),
        "built": DeepseekV3ForCausalLM._from_config(tiny_config(), dtype=torch.bfloat16),
        "loaded": DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
    }
    for how, lower in models.items():
        gate = lower.model.layers[1].mlp.gate
        assert gate.weight.dtype == torch.bfloat16, how
        assert gate.e_score_correction_bias.dtype == torch.float32, how
        if how != "built":
            expected = model.model.layers[1].mlp.gate.e_score_correction_bias
            assert torch.equal(gate.e_score_correction_bias, expected), how
        gate.e_score_correction_bias.fill_(1.0)
        gate.record_load(torch.tensor([[0, 1, 2]]), None)
        gate.update_correction_bias()
        moved = torch.tensor([-1, -1, -1, 1, 1, 1, 1, 1]) * 0.001 + 1
        assert torch.equal(gate.e_score_correction_bias, moved), how


@pytest.mark.parametrize("family", FAMILIES)
def test_config_s_methods_reach_the_layer(family):
    """The layer's choices are those of `route` with the configuration's own fields, one by one."""
    layer = moe_layer(family)
    config = tiny_config(family)
    hidden_TD = hidden_states().flatten(0, 1)
    logits_TE, weights_TK, indices_TK = layer.gate(hidden_TD)
    scores_TE = logits_TE.sigmoid() if family == "v3" else logits_TE.softmax(-1)
    expected = route(
        scores_TE,
        layer.gate.e_score_correction_bias,
        top_k=3,
        topk_method="noaux_tc" if family == "v3" else "group_limited_greedy",
        n_group=4,
        topk_group=2,
        norm_topk_prob=family == "v3",
        scale=config.routed_scaling_factor,
    )
    assert torch.equal(weights_TK, expected[0])
    assert torch.equal(indices_TK, expected[1])
