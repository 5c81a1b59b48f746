"""What padding and packed documents must not change, and where they cannot be told apart."""

import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from modeling_deepseek.packing import packed_positions
from tests.modeling_deepseek.test_mla import flash_calls, flex  # noqa: F401  # fixtures
from tests.tiny import tiny_model, tokens

LENGTHS = [6, 2, 9, 1, 3]
DOCUMENTS = [tokens(1, length, seed=length)[0] for length in LENGTHS]


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_left_padding_predicts_nothing(family):
    """The last padding token stands before the first real one; its guess is no part of the loss."""
    model = tiny_model(family)
    ids = tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    alone = model(ids, labels=ids)
    with_padding = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    torch.testing.assert_close(with_padding.lm_loss, alone.lm_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_padding.loss, alone.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention_mask", [None, torch.ones(1, 8, dtype=torch.int64)], ids=["no mask", "mask"])
def test_documents_behind_cached_tokens_are_refused(attention_mask):
    """Their tokens would see the cached ones, whatever their positions say."""
    model = tiny_model("v3")
    cache = model(tokens(1, 4), use_cache=True).past_key_values
    packed = {"position_ids": torch.tensor([[4, 5, 0, 1]]), "attention_mask": attention_mask}
    with pytest.raises(ValueError, match=r"new document in tokens that follow 4 cached ones"):
        model(tokens(1, 4), past_key_values=cache, **packed)
    assert cache.get_seq_length() == 4
    model(tokens(1, 4), position_ids=torch.tensor([[4, 5, 6, 7]]), past_key_values=cache)


# In training, by the collators that users have.

COLLATORS = {
    "positions": DataCollatorWithFlattening(),
    "positions and the rest": DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
    "seq_idx alone": DataCollatorWithFlattening(return_position_ids=False, return_seq_idx=True),
    "cu_seq_lens alone": DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True),
    "trl": DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True),
}


def packed_batch(collator: str) -> dict[str, torch.Tensor]:
    """All documents in one row."""
    return dict(COLLATORS[collator]([{"input_ids": document.tolist()} for document in DOCUMENTS]))


def separate_batch() -> dict[str, torch.Tensor]:
    """Each document in a row of its own, with padding behind."""
    pads = [(0, max(LENGTHS) - length) for length in LENGTHS]
    return {
        "input_ids": torch.stack([F.pad(ids, pad) for ids, pad in zip(DOCUMENTS, pads, strict=True)]),
        "labels": torch.stack([F.pad(ids, pad, value=-100) for ids, pad in zip(DOCUMENTS, pads, strict=True)]),
        "attention_mask": torch.stack(
            [F.pad(torch.ones_like(ids), pad) for ids, pad in zip(DOCUMENTS, pads, strict=True)]
        ),
    }


def training_step(implementation: str, inputs: dict[str, torch.Tensor], **kwargs):
    """Loss, its parts, gradients and load of a model with two MTP modules and a balance loss that counts."""
    model = tiny_model(num_nextn_predict_layers=2, aux_loss_alpha=0.25, mla_path="expanded").train()
    model.config._attn_implementation = implementation  # not at construction, which asks for the real package
    output = model(**inputs, **kwargs)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    load = {layer: counts_E.tolist() for layer, counts_E in model.update_correction_bias().items()}
    return [output.loss, output.lm_loss, *output.mtp_losses, output.aux_loss], gradients, load


@pytest.mark.usefixtures("flash_calls")
@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_training_is_training_on_each_document(implementation, collator, use_cache):
    """In loss, in every part of it, in gradients and in the load of the experts, MTP modules included."""
    expected, expected_gradients, expected_load = training_step(implementation, separate_batch(), use_cache=False)
    found, gradients, load = training_step(implementation, packed_batch(collator), use_cache=use_cache)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert load == expected_load
    for name, gradient in gradients.items():
        expected_gradient = expected_gradients[name]
        assert (gradient - expected_gradient).abs().max() < 1e-5 * expected_gradient.abs().max(), name
    whole, expected_whole = (
        torch.cat([gradient.flatten() for gradient in each.values()]) for each in (gradients, expected_gradients)
    )
    assert (whole - expected_whole).norm() < 1e-6 * expected_whole.norm()


@pytest.mark.parametrize("collator", ["seq_idx alone", "cu_seq_lens alone"])
def test_no_target_crosses_into_the_next_document(collator):
    """Although the labels would have one there: the collators take the first of each document out."""
    packed = packed_batch(collator)
    packed["labels"] = packed["input_ids"]
    expected, _, _ = training_step("sdpa", separate_batch())
    found, _, _ = training_step("sdpa", packed)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("collator", COLLATORS)
@torch.no_grad()
def test_packed_losses_under_flex_attention(collator):
    """Which has no backward pass on CPU."""
    model = tiny_model(num_nextn_predict_layers=2, aux_loss_alpha=0.25, mla_path="expanded").train()
    expected = model(**separate_batch())
    model.config._attn_implementation = "flex_attention"
    found = model(**packed_batch(collator))
    for name in ("loss", "lm_loss", "aux_loss"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-6)
    assert torch.stack(found.mtp_losses).tolist() == pytest.approx(torch.stack(expected.mtp_losses).tolist(), rel=1e-6)


def test_positions_by_hand():
    ids = torch.zeros(2, 4, dtype=torch.int64)
    seq_idx = torch.tensor([[0, 0, 1, 2], [5, 5, 5, 0]])
    expected = [[0, 1, 0, 0], [0, 1, 2, 0]]
    assert packed_positions({"input_ids": ids, "seq_idx": seq_idx}).tolist() == expected
    bounds = torch.tensor([0, 2, 3, 4, 7, 8], dtype=torch.int32)
    assert packed_positions({"input_ids": ids, "cu_seq_lens_q": bounds}).tolist() == expected
    assert packed_positions({"inputs_embeds": torch.zeros(2, 4, 3), "cu_seq_lens_q": bounds}).tolist() == expected
    given = torch.tensor([[7, 8, 9, 10]])
    assert packed_positions({"input_ids": ids, "seq_idx": seq_idx, "position_ids": given}) is given
    assert packed_positions({"input_ids": ids}) is None
