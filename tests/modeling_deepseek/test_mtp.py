"""Multi-token prediction: shifts by hand, the losses from the paper's formulas written out below, and the logits of
transformers' own MTP modules on the same checkpoint."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import DeepseekV3ForCausalLM as LibraryForCausalLM
from transformers import DynamicCache
from transformers.modeling_layers import MtpModel

from modeling_deepseek import DeepseekV3ForCausalLM
from modeling_deepseek.decoder_layer import DeepseekDecoderLayer
from modeling_deepseek.mtp import same_document, shift_left, targets_ahead
from modeling_deepseek.packing import document_ids
from tests.tiny import tiny_model, tokens

LAMBDA, ALPHA = 0.3, 0.25  # ALPHA large enough to be seen at 1e-5
IGNORE = -100

# Shifts, by hand: two documents of 3 and 2 tokens and one of a single token.
LABELS = torch.tensor([[11, 12, 13, 21, 22, 31]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2]])


@pytest.mark.parametrize(
    ("position_ids", "expected"),
    [
        ([0, 1, 2, 3], [0, 0, 0, 0]),
        ([0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 1, 2]),
        ([7, 8, 9, 3, 4], [0, 0, 0, 1, 1]),  # a document may begin anywhere
        ([0, 0, 0], [0, 1, 2]),
    ],
)
def test_document_ids_by_hand(position_ids, expected):
    assert document_ids(torch.tensor([position_ids])).tolist() == [expected]


@pytest.mark.parametrize(
    ("steps", "packed", "expected"),
    [
        (1, False, [12, 13, 21, 22, 31, IGNORE]),  # the main model
        (2, False, [13, 21, 22, 31, IGNORE, IGNORE]),  # module 1
        (3, False, [21, 22, 31, IGNORE, IGNORE, IGNORE]),  # module 2
        (1, True, [12, 13, IGNORE, 22, IGNORE, IGNORE]),
        (2, True, [13, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE]),
        (3, True, [IGNORE] * 6),
        (7, False, [IGNORE] * 6),  # deeper than the sequence is long
    ],
)
def test_targets_by_hand(steps, packed, expected):
    assert targets_ahead(LABELS, DOCUMENTS if packed else None, steps).tolist() == [expected]


def test_targets_do_not_cross_a_document_that_is_skipped():
    """Three ahead of 12 lies 22, in another document, with 21 between them."""
    assert same_document(DOCUMENTS, LABELS, 3).tolist() == [[False] * 6]
    assert same_document(None, LABELS, 2).tolist() == [[True] * 4 + [False] * 2]


def test_shift_left_by_hand():
    assert shift_left(LABELS, 2, fill=-1).tolist() == [[13, 21, 22, 31, -1, -1]]
    assert shift_left(LABELS[..., None].float(), 5).squeeze(-1).tolist() == [[31.0, 0, 0, 0, 0, 0]]


# The paper's formulas (V3 2.2), for one document at a time and without shifts, masks or padding


def rms_norm(x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def balance(logits_TE: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """Equations 17 to 20, without alpha."""
    affinity_TE = logits_TE.sigmoid()
    p_E = (affinity_TE / affinity_TE.sum(-1, keepdim=True)).mean(0)
    f_E = torch.bincount(indices_TK.flatten(), minlength=8) * 8 / (3 * len(indices_TK))
    return (f_E * p_E).sum()


def written_out(model: DeepseekV3ForCausalLM, document: torch.Tensor) -> dict[str, list]:
    """For a document t_1 .. t_T, (T,): the cross-entropy of every prediction and the balance loss of every layer, for
    depth 0 (the main model), 1, ... Module k runs on the first T - k positions only. Passes beyond the modules are the
    last one's: at position i it goes on from its own output at i - 1, at the first from what it saw before."""
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    layers, main = model.model.layers, model.config.num_hidden_layers
    rope = model.model.rotary_emb(torch.arange(len(document))[None])
    hidden, balances = embedding[document][None], []
    for layer in layers[:main]:
        hidden, logits, indices = layer(hidden, position_embeddings=rope)
        if indices is not None:
            balances.append(balance(logits, indices))
    before_norm = hidden
    hidden = rms_norm(hidden, model.model.norm)
    losses = [F.cross_entropy(hidden[0, :-1] @ head.T, document[1:], reduction="none")]
    balances = [balances]
    if model.config.mtp_hidden_state == "before_norm":
        hidden = before_norm
    passes, seen = list(enumerate(layers[main:], start=1)), hidden
    for again in range(-len(passes), model.config.mtp_passes - 1):
        depth, layer = passes[min(again, -1)]
        length = len(document) - depth
        if length < 1:
            break
        if again >= 0:
            hidden = torch.cat([seen[:, :1], hidden[:, :-1]], dim=1)
        seen = hidden[:, :length]
        joined = [rms_norm(embedding[document[depth:]][None], layer.enorm), rms_norm(hidden[:, :length], layer.hnorm)]
        rope = [part[:, :length] for part in rope]
        joined = torch.cat(joined, -1) @ layer.eh_proj.weight.T
        hidden, logits, indices = DeepseekDecoderLayer.forward(layer, joined, position_embeddings=rope)
        normed = rms_norm(hidden, layer.shared_head.norm)
        predicted = normed[0, : length - 1] @ head.T
        losses.append(F.cross_entropy(predicted, document[depth + 1 :], reduction="none"))
        balances.append([balance(logits, indices)])
        if model.config.mtp_hidden_state == "after_norm":
            hidden = normed
    return {"losses": losses, "balances": balances}


def expected_parts(model: DeepseekV3ForCausalLM, documents: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """lm, mtp (one value a depth) and aux over all documents: token means, and means over the documents that have a
    token at the depth."""
    each = [written_out(model, document) for document in documents]
    depths = range(model.config.num_nextn_predict_layers + model.config.mtp_passes)
    means = []
    for depth in depths:
        losses = torch.cat([one["losses"][depth] for one in each if len(one["losses"]) > depth])
        means.append(losses.mean() if len(losses) else losses.sum())
    aux = sum(
        torch.stack(layer).mean()
        for depth in depths
        for layer in zip(*(one["balances"][depth] for one in each if len(one["balances"]) > depth), strict=True)
    )
    return {"lm": means[0], "mtp": torch.stack(means[1:]), "aux": aux}


def mtp_model(depth: int = 1, **overrides) -> DeepseekV3ForCausalLM:
    """A tiny model in training mode; `expanded`, so that both sides take the same path for every length."""
    overrides = {"mtp_loss_weight": LAMBDA, "aux_loss_alpha": ALPHA, "mla_path": "expanded", **overrides}
    model = tiny_model(num_nextn_predict_layers=depth, **overrides).train()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # norms of ones would hide one norm taken for another
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
    return model


def assert_parts(output, expected: dict[str, torch.Tensor]) -> None:
    assert output.lm_loss.item() == pytest.approx(expected["lm"].item(), abs=1e-5)
    assert torch.stack(output.mtp_losses).tolist() == pytest.approx(expected["mtp"].tolist(), abs=1e-5)
    assert output.aux_loss.item() == pytest.approx(expected["aux"].item(), abs=1e-5)
    total = expected["lm"] + LAMBDA * expected["mtp"].mean() + ALPHA * expected["aux"]
    assert output.loss.item() == pytest.approx(total.item(), abs=1e-5)


def in_layout(documents: list[torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """The documents as one batch: each in a row with padding on one side, all packed in a row, or the last two packed
    in a second row, with padding behind."""
    if layout == "packed and padded":
        rows = [in_layout(documents[:-2], "packed"), in_layout(documents[-2:], "packed")]
        for row in rows:
            row["attention_mask"] = torch.ones_like(row["input_ids"])
        pad = rows[0]["input_ids"].shape[1] - rows[1]["input_ids"].shape[1]
        for name, tensor in rows[1].items():
            rows[1][name] = F.pad(tensor, (0, pad), value=IGNORE if name == "labels" else 0)
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    if layout == "packed":
        ids = torch.cat(documents)[None]
        return {
            "input_ids": ids,
            "labels": ids,
            "position_ids": torch.cat([torch.arange(len(document)) for document in documents])[None],
        }
    longest = max(len(document) for document in documents)
    pads = [longest - len(document) for document in documents]
    pads = [(pad, 0) if layout == "left" else (0, pad) for pad in pads]
    pairs = list(zip(documents, pads, strict=True))
    return {
        "input_ids": torch.stack([F.pad(document, pad) for document, pad in pairs]),
        "labels": torch.stack([F.pad(document, pad, value=IGNORE) for document, pad in pairs]),
        "attention_mask": torch.stack([F.pad(torch.ones_like(document), pad) for document, pad in pairs]),
    }


LENGTHS = [6, 2, 9, 1, 3]


@pytest.mark.parametrize("hidden_state", ["after_norm", "before_norm"])
@pytest.mark.parametrize(("depth", "passes"), [(1, 1), (2, 1), (3, 1), (1, 4), (2, 3)])
def test_loss_is_the_paper_s_and_goes_on_as_drafts_do(depth, passes, hidden_state):
    model = mtp_model(depth, mtp_hidden_state=hidden_state, mtp_passes=passes)
    ids = tokens(2, 9)
    expected = expected_parts(model, list(ids))
    assert_parts(model(ids, labels=ids), expected)
    embeds = model.model.embed_tokens(ids)
    assert_parts(model(inputs_embeds=embeds, labels=ids), expected)


@pytest.mark.parametrize("layout", ["right", "left", "packed", "packed and padded"])
@pytest.mark.parametrize(("depth", "passes"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_packed_and_padded_documents_lose_as_if_alone(depth, passes, layout):
    """With documents too short for a target, or for a single position, at some depth."""
    model = mtp_model(depth, mtp_passes=passes)
    documents = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    expected = expected_parts(model, documents)
    output = model(**in_layout(documents, layout))
    assert_parts(output, expected)

    expected_loss = expected["lm"] + LAMBDA * expected["mtp"].mean() + ALPHA * expected["aux"]
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(output.loss, parameters.values())
    expected_gradients = torch.autograd.grad(expected_loss, parameters.values())
    for name, gradient, expected_gradient in zip(parameters, gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).abs().max() < 1e-5 * expected_gradient.abs().max(), name


@pytest.mark.parametrize("layout", ["right", "left", "packed", "packed and padded"])
def test_load_of_packed_and_padded_documents_is_that_of_each_alone(layout):
    """Positions without a token to look ahead to are no load of a module."""
    model = mtp_model(2)
    documents = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    for document in documents:
        model(document[None], labels=document[None])
    alone = model.update_correction_bias()
    model = mtp_model(2)
    model(**in_layout(documents, layout))
    together = model.update_correction_bias()
    assert {layer: counts.tolist() for layer, counts in together.items()} == {
        layer: counts.tolist() for layer, counts in alone.items()
    }
    chosen = 3 * sum(LENGTHS)
    at_depth = [3 * sum(max(length - depth, 0) for length in LENGTHS) for depth in (1, 2)]
    assert [counts.sum().item() for counts in together.values()] == [chosen, chosen, *at_depth]


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 1, 2], [1]])
@pytest.mark.parametrize("layout", ["packed", "right"])
def test_no_nan_where_there_is_nothing_to_predict(layout, lengths):
    model = mtp_model(2)
    documents = [tokens(1, length, seed=length)[0] for length in lengths]
    output = model(**in_layout(documents, layout))
    output.loss.backward()
    assert math.isfinite(output.loss.item())
    assert [loss.item() for loss in output.mtp_losses] == [0.0, 0.0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("with_items", ["int", "tensor"])
def test_accumulated_micro_batches_are_one_batch(with_items):
    """`num_items_in_batch` divides every token loss, as `Trainer` asks, so that the sum over micro-batches is the loss
    of all their rows at once; the balance loss takes each micro-batch's share of the targets."""
    model = mtp_model(2)
    ids = tokens(4, 7)
    items = 4 * 6
    num_items = items if with_items == "int" else torch.tensor(items)
    each = [written_out(model, document) for document in ids]
    lm, *mtp = (sum(one["losses"][depth].sum() for one in each) / items for depth in range(3))
    aux = expected_parts(model, list(ids))["aux"]
    expected = (lm + LAMBDA * (mtp[0] + mtp[1]) / 2 + ALPHA * aux).item()

    whole = model(ids, labels=ids, num_items_in_batch=num_items).loss
    parts = [model(part, labels=part, num_items_in_batch=num_items).loss for part in ids.split([1, 2, 1])]
    assert whole.item() == pytest.approx(expected, abs=1e-5)
    assert sum(parts).item() == pytest.approx(expected, abs=1e-5)


def test_shift_labels_are_taken_as_they_are():
    model = mtp_model(2)
    ids = tokens(2, 9)
    shifted = F.pad(ids[:, 1:], (0, 1), value=IGNORE)
    expected = model(ids, labels=ids)
    output = model(ids, shift_labels=shifted)
    assert output.loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)


# The modules as part of the model


def test_main_logits_do_not_depend_on_the_modules(tmp_path):
    model = mtp_model(2).eval()
    model.save_pretrained(tmp_path)
    without = DeepseekV3ForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=0)
    ids = tokens()
    assert len(without.model.layers) == 3
    assert torch.equal(model(ids).logits, without(ids).logits)
    assert torch.equal(model(ids, labels=ids).logits, without(ids).logits)


def test_embedding_and_head_are_shared_not_copied():
    model = mtp_model(2)
    hidden = model.config.hidden_size
    main, module = model.model.layers[2], model.model.layers[3]
    size = sum(parameter.numel() for parameter in main.parameters())
    assert sum(parameter.numel() for parameter in module.parameters()) == size + 2 * hidden * hidden + 3 * hidden
    vocabulary = [name for name, parameter in model.named_parameters() if model.vocab_size in parameter.shape]
    assert vocabulary == ["model.embed_tokens.weight", "lm_head.weight"]


def test_mtp_loss_trains_its_modules_and_everything_below():
    model = mtp_model(2)
    ids = tokens(4, 20)
    outputs = model.model(ids)
    losses, _ = model.mtp_token_losses(outputs, model.next_targets(ids, None, {}), {"input_ids": ids})
    torch.stack([loss.sum() for loss, _ in losses]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_no_weight_no_modules():
    model = mtp_model(2, mtp_loss_weight=0)
    ids = tokens()
    for layer in model.model.layers[3:]:
        layer.register_forward_hook(lambda *_: pytest.fail("an MTP module ran"))
    output = model(ids, labels=ids)
    assert output.mtp_losses is None
    assert output.loss.item() == pytest.approx(output.lm_loss.item() + ALPHA * output.aux_loss.item(), abs=1e-6)


def test_labels_over_a_filled_cache_are_refused():
    model = mtp_model(1).eval()
    ids = tokens(2, 8)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"already held 5 tokens.*mtp_loss_weight = 0"):
        model(ids[:, 5:], labels=ids[:, 5:], past_key_values=cache)
    model(ids, labels=ids, past_key_values=DynamicCache(config=model.config))  # an empty one hides nothing
    model.config.mtp_loss_weight = 0
    cache = model(ids[:, :5], use_cache=True).past_key_values
    assert model(ids[:, 5:], labels=ids[:, 5:], past_key_values=cache).mtp_losses is None


@pytest.mark.parametrize("depth", [1, 2])
def test_logits_of_the_library_s_modules(tmp_path, depth):
    """transformers keeps MTP modules apart from the model, for drafting, and finds their weights by a pattern that
    fits layer 61 only."""
    model = mtp_model(depth, initializer_range=0.1).eval()
    model.save_pretrained(tmp_path)
    library = LibraryForCausalLM.from_pretrained(tmp_path)
    library._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{3 + module}.*" for module in range(depth)]
    modules = MtpModel.from_pretrained(library).eval()

    ids = tokens(1, 11)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: seen.append(logits))
    with torch.no_grad():
        model(ids, labels=ids)
        hidden = library.model(ids).last_hidden_state
        expected = [library.lm_head(hidden)]
        for module in range(depth):
            hidden = modules.forward_layer(
                module,
                hidden[:, :-1],
                torch.arange(module + 1, 11)[None],
                None,
                input_ids=ids[:, module + 1 :],
            )
            expected.append(library.lm_head(hidden))
    assert len(seen) == depth + 1
    for logits, expected_logits in zip(seen, expected, strict=True):
        torch.testing.assert_close(logits[:, : expected_logits.shape[1]], expected_logits, rtol=0, atol=1e-5)
