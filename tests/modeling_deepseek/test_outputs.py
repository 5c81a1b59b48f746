"""What the models return besides logits, in which shape, precision and form, against transformers' own classes on the
same weights; the classification heads; and what users do with a model as a PyTorch module."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F
from transformers.models import deepseek_v2, deepseek_v3

from modeling_deepseek import (
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
)
from tests.tiny import tiny_config, tiny_model, tokens

FAMILIES = ["v2", "v3"]
THEIRS = {"v2": deepseek_v2.DeepseekV2ForCausalLM, "v3": deepseek_v3.DeepseekV3ForCausalLM}
SEQUENCE_HEADS = {"v2": DeepseekV2ForSequenceClassification, "v3": DeepseekV3ForSequenceClassification}
TOKEN_HEADS = {"v2": DeepseekV2ForTokenClassification, "v3": DeepseekV3ForTokenClassification}
BATCH, LENGTH, HIDDEN, HEADS, EXPERTS = 2, 12, 64, 4, 8
LAYERS, MOE_LAYERS = 3, 2  # the first is dense
EVERYTHING = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_model(family, attn_implementation="eager", num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def theirs(family, model, tmp_path_factory):
    """transformers' own class with the weights of `model`."""
    folder = tmp_path_factory.mktemp(family)
    model.save_pretrained(folder)
    return THEIRS[family].from_pretrained(folder, attn_implementation="eager")


# Beside the logits.


@torch.no_grad()
def test_hidden_states_attentions_and_router_logits_are_transformers(model, theirs):
    ours, expected = model(tokens(), **EVERYTHING), theirs(tokens(), **EVERYTHING)
    assert distance(ours.logits, expected.logits) < 1e-5
    for name, count in {"hidden_states": LAYERS + 1, "attentions": LAYERS}.items():
        assert len(ours[name]) == len(expected[name]) == count
        for actual, reference in zip(ours[name], expected[name], strict=True):
            assert actual.shape == reference.shape
            assert distance(actual, reference) < 1e-5, name
    assert torch.equal(ours.hidden_states[0], model.get_input_embeddings()(tokens()))
    # The last one is normed: it is what the head sees.
    assert torch.equal(model.lm_head(ours.hidden_states[-1]), ours.logits)

    assert [logits.shape for logits in ours.router_logits] == [(BATCH * LENGTH, EXPERTS)] * MOE_LAYERS
    first_moe = LAYERS - MOE_LAYERS
    for index, logits in enumerate(ours.router_logits):
        layer = theirs.model.layers[first_moe + index]
        # The state that enters the MLP, from transformers' own layer.
        seen = []
        hook = layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: seen.append(output))  # noqa: B023  # used in this round only
        theirs(tokens())
        hook.remove()
        assert distance(logits, F.linear(seen[0].flatten(0, 1), layer.mlp.gate.weight)) < 1e-5


def test_nothing_is_returned_that_was_not_asked_for(model):
    assert set(model(tokens(), use_cache=False)) == {"logits"}
    assert set(model(tokens())) == {"logits", "past_key_values"}
    assert set(model(tokens(), use_cache=False, output_router_logits=True)) == {"logits", "router_logits", "aux_loss"}


@pytest.mark.parametrize("labels", [None, tokens()])
def test_gradient_checkpointing_returns_the_same(family, labels):
    plain = tiny_model(family, attn_implementation="eager").train()
    recomputing = copy.deepcopy(plain)
    recomputing.activation_checkpointing_enable()
    outputs = []
    for trained in (plain, recomputing):
        output = trained(tokens(), labels=labels, use_cache=False, **EVERYTHING)
        (output.logits.square().mean() if labels is None else output.loss).backward()
        # Read after the backward pass, which runs every layer once more.
        outputs.append(output)
    expected, actual = outputs
    assert actual.aux_loss == expected.aux_loss
    for name, count in {"hidden_states": LAYERS + 1, "attentions": LAYERS, "router_logits": MOE_LAYERS}.items():
        assert len(actual[name]) == count
        assert all(map(torch.equal, actual[name], expected[name])), name
    gradients = zip(plain.parameters(), recomputing.parameters(), strict=True)
    for parameter, recomputed in gradients:
        assert (parameter.grad is None) == (recomputed.grad is None)
        if parameter.grad is not None:
            assert distance(recomputed.grad, parameter.grad) < 1e-5


@torch.no_grad()
def test_tuples(model):
    expected = model(tokens(), labels=tokens(), **EVERYTHING)
    actual = model(tokens(), labels=tokens(), return_dict=False, **EVERYTHING)
    assert isinstance(actual, tuple)
    assert torch.equal(actual[0], expected.loss)
    assert len(actual) == len(expected)
    stack = model.model(tokens(), return_dict=False)
    assert isinstance(stack, tuple)
    assert torch.equal(model.lm_head(stack[0]), expected.logits)


@torch.no_grad()
def test_tuples_by_configuration():
    model = tiny_model()
    expected = model(tokens(), labels=tokens())
    model.config.return_dict = False
    actual = model(tokens(), labels=tokens())
    assert isinstance(actual, tuple)
    assert torch.equal(actual[0], expected.loss)


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 3, 11])])
@torch.no_grad()
def test_logits_to_keep(model, keep):
    full = model(tokens()).logits
    kept = model(tokens(), logits_to_keep=keep).logits
    expected = full[:, -keep:] if isinstance(keep, int) else full[:, keep]
    assert kept.shape == expected.shape
    assert distance(kept, expected) < 1e-5


@torch.no_grad()
def test_embeddings_instead_of_tokens(family):
    model = tiny_model(family, attn_implementation="eager", num_nextn_predict_layers=1)
    embeddings = model.get_input_embeddings()(tokens())
    expected = model(tokens(), labels=tokens(), **EVERYTHING)
    actual = model(inputs_embeds=embeddings, labels=tokens(), **EVERYTHING)
    assert actual.loss == expected.loss
    assert actual.mtp_losses == expected.mtp_losses
    assert torch.equal(actual.logits, expected.logits)
    assert all(map(torch.equal, actual.hidden_states, expected.hidden_states))


@pytest.mark.parametrize("both", [False, True])
def test_tokens_or_embeddings_but_not_both(model, both):
    inputs = {"input_ids": tokens(), "inputs_embeds": model.get_input_embeddings()(tokens())} if both else {}
    for called in (model, model.model):
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            called(**inputs)


# Classification.


def classifier(classes, family, **overrides):
    """Of `tiny-v2` or `tiny-v3`, with MTP modules in the configuration, which a classifier has no use for."""
    torch.manual_seed(0)
    config = tiny_config(family, pad_token_id=0, num_labels=3, num_nextn_predict_layers=1, **overrides)
    return classes[family]._from_config(config, attn_implementation="sdpa").eval()


@torch.no_grad()
def test_sequence_is_classified_by_its_last_token(family):
    model = classifier(SEQUENCE_HEADS, family)
    assert len(model.model.layers) == LAYERS
    text = tokens(1, 8)
    alone = model(text).logits
    assert alone.shape == (1, 3)
    assert torch.equal(alone, model.score(model.model(text).last_hidden_state[:, -1]))
    padding = torch.zeros(1, 4, dtype=torch.int64)
    batch = torch.cat([torch.cat([padding, text], dim=1), torch.cat([text, padding], dim=1)])
    logits = model(batch, attention_mask=(batch != 0).long()).logits
    assert distance(logits, alone.expand(2, -1)) < 1e-5


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_loss_of_sequence_classification(family, problem):
    model = classifier(SEQUENCE_HEADS, family)
    model.config.problem_type = problem
    labels = torch.tensor([2, 0]) if problem.startswith("single") else torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    output = model(tokens(), labels=labels)
    loss = {
        "single_label_classification": F.cross_entropy,
        "multi_label_classification": F.binary_cross_entropy_with_logits,
        "regression": F.mse_loss,
    }[problem]
    torch.testing.assert_close(output.loss, loss(output.logits, labels), rtol=1e-5, atol=1e-5)


def test_loss_of_token_classification(family):
    model = classifier(TOKEN_HEADS, family)
    labels = tokens() % 3
    labels[:, :5] = -100
    output = model(tokens(), labels=labels)
    assert output.logits.shape == (BATCH, LENGTH, 3)
    assert torch.equal(output.logits, model.score(model.model(tokens()).last_hidden_state))
    expected = F.cross_entropy(output.logits[:, 5:].flatten(0, 1), labels[:, 5:].flatten())
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [SEQUENCE_HEADS, TOKEN_HEADS], ids=["sequence", "token"])
def test_training_a_classifier_moves_every_parameter(family, classes):
    model = classifier(classes, family).train()
    input_ids = tokens(64, 6)  # many last tokens, since only these reach the last layer of a sequence classifier
    labels = input_ids % 3 if classes is TOKEN_HEADS else input_ids[:, 0] % 3
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(input_ids, labels=labels).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    for name, parameter in model.named_parameters():
        moved = parameter != before[name]
        assert moved.any(), name
        if ".experts." in name:
            assert moved.flatten(1).any(dim=1).all(), f"an expert of {name} was never chosen"


# Precision.


@pytest.mark.parametrize("path", ["expanded", "absorbed"])
@torch.no_grad()
def test_bfloat16_is_close_to_float32(family, path):
    # Every expert for every token: a choice that tips over in the last bit would change the result by any amount.
    everyone = {"num_experts_per_tok": EXPERTS, "n_group": 1, "topk_group": 1, "mla_path": path}
    expected = tiny_model(family, **everyone)(tokens()).logits
    actual = tiny_model(family, **everyone).to(torch.bfloat16)(tokens()).logits
    assert actual.dtype == torch.bfloat16
    error = (actual.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    # About 20 roundings of 2^-9 a layer, independent of each other: sqrt(60) * 2^-9 < 2^-6, and as much again for the
    # sharp attention of weights as wide as these.
    assert error < 2**-5


CASTS = {
    "to": lambda model, folder: model.to(torch.bfloat16),
    "half": lambda model, folder: model.half(),
    "to and back": lambda model, folder: model.to(torch.bfloat16).float(),
    "from_pretrained": lambda model, folder: (
        model.save_pretrained(folder) or type(model).from_pretrained(folder, dtype=torch.bfloat16)
    ),
}


@pytest.mark.parametrize("cast", CASTS)
def test_state_that_stays_in_float32(cast, tmp_path):
    model = tiny_model()
    biases = [layer.mlp.gate.e_score_correction_bias.clone() for layer in model.model.layers if layer.is_moe]
    frequencies = model.model.rotary_emb.inv_freq.clone()
    assert any(not torch.equal(bias.bfloat16().float(), bias) for bias in [*biases, frequencies])
    model = CASTS[cast](model, tmp_path)
    assert model.dtype == {"half": torch.float16, "to and back": torch.float32}.get(cast, torch.bfloat16)
    after = [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers if layer.is_moe]
    assert len(after) == 3
    for bias, expected in zip([*after, model.model.rotary_emb.inv_freq], [*biases, frequencies], strict=True):
        assert bias.dtype == torch.float32
        assert torch.equal(bias, expected)


# The model as a module.


@torch.no_grad()
def test_copies(model):
    expected = model(tokens(), output_hidden_states=True).logits  # which leaves hooks on the model
    copied = copy.deepcopy(model)
    assert torch.equal(copied(tokens(), output_hidden_states=True).logits, expected)
    copied.lm_head.weight.zero_()
    assert torch.equal(model(tokens()).logits, expected)


@torch.no_grad()
def test_pickled(family):
    model = tiny_model(family)
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(restored(tokens()).logits, model(tokens()).logits)
    assert restored.config.to_dict() == model.config.to_dict()


def test_number_of_parameters():
    embedding = head = 256 * 64
    attention = 64 * 24 + 24 + 24 * 4 * 24 + 64 * (32 + 8) + 32 + 32 * 4 * (16 + 16) + 4 * 16 * 64
    norms = 2 * 64
    dense = 3 * 64 * 128
    experts = 8 * 64 + (8 + 1) * 3 * 64 * 32  # gate, eight routed and one shared
    mtp = attention + norms + experts + 2 * 64 * 64 + 3 * 64  # eh_proj, enorm, hnorm, shared_head.norm
    total = embedding + 3 * (attention + norms) + dense + 2 * experts + mtp + 64 + head
    model = tiny_model("v3")
    assert model.num_parameters() == total
    assert model.num_parameters(exclude_embeddings=True) == total - embedding


@pytest.mark.parametrize("size", [260, 200])
@torch.no_grad()
def test_resized_vocabulary(family, size, tmp_path):
    model = tiny_model(family, num_nextn_predict_layers=1)
    input_ids = tokens() % 190 + 2
    expected = model(input_ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size
    output = model(input_ids, labels=input_ids)  # the MTP module shares the resized embedding and head
    assert output.logits.shape[-1] == size
    assert len(output.mtp_losses) == 1
    kept = min(size, 256)
    assert torch.equal(output.logits[..., :kept], expected[..., :kept])
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(input_ids).logits, output.logits)
