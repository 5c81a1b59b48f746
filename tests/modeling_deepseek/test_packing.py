"""What padding and packed documents must not change, and where they cannot be told apart."""

import pytest
import torch

from tests.tiny import tiny_model, tokens


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
