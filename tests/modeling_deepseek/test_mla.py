"""Both attention paths against each other and against each document run alone, whatever separates the documents; what
a decode step may touch and allocate; and what the attention is a contract for (expand_kv, attention functions)."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch.nn import functional as F
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache, StaticCache, masking_utils
from transformers.integrations import flex_attention as transformers_flex

from modeling_deepseek import mla as mla_module
from modeling_deepseek.mla import DeepseekMLA, choose_mla_path
from modeling_deepseek.rope import rope_angles, rope_frequencies
from tests.caches import CACHES, new_cache
from tests.tiny import tiny_config, tiny_model, tokens

PATHS = ["expanded", "absorbed"]
LENGTH = 12


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value: float32 itself is relative, and logits here reach 8."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# Documents in a batch of two rows, and the ways to say where they lie.


@dataclass
class Batch:
    spans: list[tuple[int, int, int]]  # row, start, stop of each document
    inputs: dict[str, Any]
    cache: Callable | None = field(default=None)


def positions(*lengths_of_rows: list[int]) -> torch.Tensor:
    return torch.tensor([list(itertools.chain(*(range(length) for length in lengths))) for lengths in lengths_of_rows])


def mask_2d(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(flag) for flag in row] for row in rows])


def mask_4d(spans) -> torch.Tensor:
    allowed = torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    for row, start, stop in spans:
        allowed[row, 0, start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
    return allowed


PACKED = [(0, 0, 4), (0, 4, 12), (1, 0, 7), (1, 7, 9), (1, 9, 12)]
PACKED_POSITIONS = positions([4, 8], [7, 2, 3])
LEFT = [(0, 3, 12), (1, 0, 12)]
LEFT_MASK = mask_2d("000111111111", "111111111111")
# Documents padded one by one, as for blocks of a fixed size: positions run on over the padding behind each.
BLOCKS = [(0, 0, 3), (0, 6, 12), (1, 0, 6), (1, 6, 10)]
BLOCKS_MASK = mask_2d("111000111111", "111111111100")

BATCHES = {
    "plain": Batch([(0, 0, 12), (1, 0, 12)], {}),
    "left padding": Batch(LEFT, {"attention_mask": LEFT_MASK}),
    # generate's positions: 1 for padding, so that they fall back where the text begins
    "left padding, positions": Batch(
        LEFT, {"attention_mask": LEFT_MASK, "position_ids": (LEFT_MASK.cumsum(-1) - 1).masked_fill(LEFT_MASK == 0, 1)}
    ),
    "right padding": Batch(
        [(0, 0, 9), (1, 0, 12)], {"attention_mask": mask_2d("111111111000", "111111111111"), "use_cache": False}
    ),
    "packed": Batch(PACKED, {"position_ids": PACKED_POSITIONS, "use_cache": False}),
    "packed, cached": Batch(PACKED, {"position_ids": PACKED_POSITIONS, "use_cache": True}),
    "packed, static cache": Batch(
        PACKED, {"position_ids": PACKED_POSITIONS}, lambda config: StaticCache(config, max_cache_len=16)
    ),
    "packed, all-ones mask": Batch(
        PACKED, {"position_ids": PACKED_POSITIONS, "attention_mask": torch.ones(2, LENGTH, dtype=torch.int64)}
    ),
    "packed, the same in every row": Batch(
        [(0, 0, 4), (0, 4, 12), (1, 0, 4), (1, 4, 12)],
        {"position_ids": positions([4, 8]), "attention_mask": torch.ones(2, LENGTH, dtype=torch.int64)},
    ),
    "packed, padded one by one": Batch(
        BLOCKS, {"position_ids": positions([6, 6], [6, 6]), "attention_mask": BLOCKS_MASK}
    ),
    "packed, behind padding": Batch(
        [(0, 2, 6), (0, 6, 12), (1, 0, 12)],
        {"position_ids": positions([6, 6], [12]), "attention_mask": mask_2d("001111111111", "111111111111")},
    ),
    "boolean 4-D mask": Batch(PACKED, {"position_ids": PACKED_POSITIONS, "attention_mask": mask_4d(PACKED)}),
    "additive 4-D mask": Batch(
        PACKED,
        {
            "position_ids": PACKED_POSITIONS,
            "attention_mask": torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(
                ~mask_4d(PACKED), torch.finfo(torch.float32).min
            ),
        },
    ),
}
WITHOUT_READY_MASKS = [name for name in BATCHES if "4-D" not in name]


def run(model, path: str, batch: Batch) -> torch.Tensor:
    """Logits of the batch, padding left out, document after document."""
    model.config.mla_path = path
    cache = {"past_key_values": batch.cache(model.config)} if batch.cache else {}
    logits = model(tokens(2, LENGTH), **batch.inputs, **cache).logits
    return torch.cat([logits[row, start:stop] for row, start, stop in batch.spans])


def run_alone(model, batch: Batch) -> torch.Tensor:
    """The same, each document in a forward pass of its own."""
    model.config.mla_path = "expanded"
    input_ids = tokens(2, LENGTH)
    return torch.cat([model(input_ids[row : row + 1, start:stop]).logits[0] for row, start, stop in batch.spans])


@pytest.fixture(scope="module")
def models():
    return {
        (family, implementation): tiny_model(family, attn_implementation=implementation)
        for family in ("v2", "v3")
        for implementation in ("eager", "sdpa")
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize("name", BATCHES)
@torch.no_grad()
def test_a_batch_equals_its_documents_alone(models, name, family, implementation, path):
    model = models[family, implementation]
    assert distance(run(model, path, BATCHES[name]), run_alone(model, BATCHES[name])) < 1e-5


def gradients(model, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert distance(actual[name], gradient) < 1e-5, name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize("name", ["plain", "left padding", "packed", "packed, padded one by one"])
def test_gradients_of_both_paths(name, family, implementation):
    model = tiny_model(family, attn_implementation=implementation, num_nextn_predict_layers=0)
    expected = gradients(model, run_alone(model, BATCHES[name]))
    assert len(expected) == len(list(model.parameters()))
    for path in PATHS:
        assert_same_gradients(gradients(model, run(model, path, BATCHES[name])), expected)


SHAPES = {
    "no query compression": {"q_lora_rank": None},
    "value wider than key": {"v_head_dim": 40},
    "value narrower than nope": {"v_head_dim": 12},
    "biases": {"attention_bias": True},
    "three heads, odd sizes": {"num_attention_heads": 3, "qk_nope_head_dim": 10, "v_head_dim": 14, "kv_lora_rank": 20},
    "pairs in halves": {"rope_interleave": False},
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_both_paths_for_other_shapes(shape, family, implementation):
    model = tiny_model(family, attn_implementation=implementation, **SHAPES[shape])
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()  # zero by initialisation, where a forgotten bias would not show
    expected, actual = (run(model, path, BATCHES["left padding"]) for path in PATHS)
    assert distance(actual, expected) < 1e-5


# One layer alone: precision, blocks, contracts.


def one_layer(**overrides) -> DeepseekMLA:
    torch.manual_seed(0)
    config = tiny_config(**{"attn_implementation": "sdpa", **overrides})
    layer = DeepseekMLA(config, 0).eval()
    for parameter in layer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return layer


def hidden_and_angles(config, length: int = LENGTH, start: int = 0):
    hidden = torch.randn(2, length, config.hidden_size, generator=torch.Generator().manual_seed(2))
    frequencies = rope_frequencies(config.rope_parameters, config.qk_rope_head_dim)
    return hidden, rope_angles(torch.arange(start, start + length)[None], frequencies)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_bfloat16(path, implementation):
    layer = one_layer(mla_path=path, attn_implementation=implementation).to(torch.bfloat16)
    hidden, angles = hidden_and_angles(layer.config)
    mask = torch.ones(LENGTH, LENGTH).tril().bool()[None, None]
    actual, _ = layer(hidden.bfloat16(), angles, mask)
    expected, _ = layer.double()(hidden.bfloat16().double(), angles, mask)
    error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    # A rounding to bfloat16 is off by at most 2^-9, and about ten of them lie between input and output; as
    # independent errors they add up to sqrt(10) * 2^-9 < 2^-7.
    assert error < 2**-7


@torch.no_grad()
def test_dropout_drops_the_same_weights_on_both_paths():
    layer = one_layer(attn_implementation="eager", attention_dropout=0.5)
    hidden, angles = hidden_and_angles(layer.config)
    mask = torch.ones(LENGTH, LENGTH).tril().bool()[None, None]
    kept, _ = layer(hidden, angles, mask)
    layer.train()
    dropped = {}
    for layer.config.mla_path in PATHS:
        torch.manual_seed(0)
        dropped[layer.config.mla_path], _ = layer(hidden, angles, mask)
    assert distance(dropped["absorbed"], dropped["expanded"]) < 1e-5
    assert distance(dropped["expanded"], kept) > 0.1


@torch.no_grad()
def test_expand_kv_against_its_formula():
    layer = one_layer(v_head_dim=12)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 1, 5, 32, generator=generator)
    rotated = torch.randn(2, 1, 5, 8, generator=generator)
    keys, values = layer.expand_kv(latents, rotated)
    assert keys.shape == (2, 4, 5, 16 + 8)
    assert values.shape == (2, 4, 5, 12)
    weight = layer.kv_b_proj.weight.view(4, 16 + 12, 32)
    for row, head, token in itertools.product(range(2), range(4), range(5)):
        expanded = weight[head] @ latents[row, 0, token]
        torch.testing.assert_close(keys[row, head, token, :16], expanded[:16], rtol=1e-5, atol=1e-5)
        assert torch.equal(keys[row, head, token, 16:], rotated[row, 0, token])
        torch.testing.assert_close(values[row, head, token], expanded[16:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("heads_per_block", [1, 3])
@torch.no_grad()
def test_expansion_in_blocks_of_heads(heads_per_block, implementation, monkeypatch):
    layer = one_layer(mla_path="expanded", attn_implementation=implementation)
    hidden, angles = hidden_and_angles(layer.config)
    mask = torch.ones(LENGTH, LENGTH).tril().bool()[None, None]
    expected, expected_weights = layer(hidden, angles, mask)
    monkeypatch.setattr(DeepseekMLA, "_heads_per_block", lambda *_: heads_per_block)
    actual, weights = layer(hidden, angles, mask)
    assert distance(actual, expected) < 1e-5
    if implementation == "eager":
        assert distance(weights, expected_weights) < 1e-5


@torch.no_grad()
def test_workspace_bounds_the_heads_expanded_at_a_time():
    # A key and value of 24 + 16 values for 2 rows x 1024 tokens take 327,680 bytes a head: three fit into 1 MiB.
    heads_seen = []

    def recorded(module, query, key, value, attention_mask, **kwargs):
        heads_seen.append(key.shape[1])
        return mla_module.eager_attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("recorded", recorded)
    try:
        layer = one_layer(mla_path="expanded", attn_implementation="recorded", mla_workspace_mib=1)
        hidden, angles = hidden_and_angles(layer.config, 1, start=1023)
        outputs = []
        for layer.config.mla_workspace_mib in (1, 512):
            generator = torch.Generator().manual_seed(0)
            cache = DynamicCache(config=layer.config)
            cache.update(
                torch.randn(2, 1, 1023, 32, generator=generator), torch.randn(2, 1, 1023, 8, generator=generator), 0
            )
            outputs.append(layer(hidden, angles, None, past_key_values=cache)[0])
    finally:
        del AttentionInterface._global_mapping["recorded"]
    assert heads_seen == [3, 1, 4]
    assert distance(outputs[0], outputs[1]) < 1e-5


@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
@torch.no_grad()
def test_absorbed_attention_in_blocks_of_queries(mask, monkeypatch):
    layer = one_layer(mla_path="absorbed", attn_implementation="eager")
    hidden, angles = hidden_and_angles(layer.config)
    allowed = torch.ones(LENGTH, LENGTH).tril().bool()[None, None]
    additive = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~allowed, torch.finfo(torch.float32).min)
    given = {"none": None, "boolean": allowed, "additive": additive}[mask]
    expected, expected_weights = layer(hidden, angles, given)
    # 2 rows x 4 heads x 12 keys = 96 scores a query: five queries at a time, the last block with two.
    monkeypatch.setattr(mla_module, "MAX_SCORE_VALUES", 5 * 96 + 95)
    blocks = []
    attention = mla_module.absorbed_attention
    monkeypatch.setattr(
        mla_module, "absorbed_attention", lambda query, *rest: blocks.append(query.shape[2]) or attention(query, *rest)
    )
    actual, weights = layer(hidden, angles, given)
    assert blocks == [5, 5, 2]
    assert distance(actual, expected) < 1e-5
    assert distance(weights, expected_weights) < 1e-5


# Which path runs.


@pytest.mark.parametrize(
    ("q_len", "kv_len", "path"),
    [
        # Multiplications a head with C 32, N 16, R 8, V 16: expanded 1024 S + 40 Q S, absorbed 1024 Q + 72 Q S.
        (1, 1, "expanded"),  # 1064, 1096
        (1, 2, "absorbed"),  # 2128, 1168
        (12, 12, "expanded"),  # 18048, 22656
        (21, 64, "absorbed"),  # 119296, 118272
        (22, 64, "expanded"),  # 121856, 123904
    ],
)
def test_choice_by_cost(q_len, kv_len, path):
    config = tiny_config(attn_implementation="sdpa")
    assert choose_mla_path(config, q_len, kv_len) == path
    for forced in PATHS:
        config.mla_path = forced
        assert choose_mla_path(config, q_len, kv_len) == forced


@pytest.mark.parametrize("implementation", ["paged|sdpa", "paged|flash_attention_2", "somebody's own"])
def test_other_attention_functions_need_expanded_keys(implementation):
    config = tiny_config(attn_implementation=implementation)
    assert choose_mla_path(config, 1, 1000) == "expanded"
    config.mla_path = "absorbed"
    with pytest.raises(ValueError, match=r"`mla_path='absorbed'` cannot run with attn_implementation="):
        choose_mla_path(config, 1, 1000)


@torch.no_grad()
def test_a_registered_attention_function_is_reached_with_expanded_keys():
    shapes = []

    def recorded(module, query, key, value, attention_mask, scaling, **kwargs):
        shapes.append((query.shape, key.shape, value.shape))
        return mla_module.eager_attention(module, query, key, value, attention_mask, scaling)

    AttentionInterface.register("recorded", recorded)
    try:
        model = tiny_model(attn_implementation="recorded", v_head_dim=12)
        cache = model(tokens(2, 5), use_cache=True).past_key_values
        model(tokens(2, 1), past_key_values=cache)
    finally:
        del AttentionInterface._global_mapping["recorded"]
    prefill = ((2, 4, 5, 24), (2, 4, 5, 24), (2, 4, 5, 12))
    decode = ((2, 4, 1, 24), (2, 4, 6, 24), (2, 4, 6, 12))
    assert shapes == [prefill] * 3 + [decode] * 3


@pytest.mark.parametrize("family", ["v2", "v3"])
@torch.no_grad()
def test_attention_weights(models, family):
    model, given = models[family, "eager"], BATCHES["left padding"].inputs
    attentions = {}
    for model.config.mla_path in PATHS:
        attentions[model.config.mla_path] = model(tokens(2, LENGTH), output_attentions=True, **given).attentions
        assert [weights.shape for weights in attentions[model.config.mla_path]] == [(2, 4, LENGTH, LENGTH)] * 3
    visible_BSS = LEFT_MASK[:, None, :].bool() & torch.ones(LENGTH, LENGTH).tril().bool()
    for expanded, absorbed in zip(attentions["expanded"], attentions["absorbed"], strict=True):
        # (B, S, H, S) of the tokens that are not padding
        expanded, absorbed = (weights.transpose(1, 2)[LEFT_MASK.bool()] for weights in (expanded, absorbed))
        assert (absorbed.sum(-1) - 1).abs().max() < 1e-5
        assert (absorbed * ~visible_BSS[LEFT_MASK.bool()][:, None]).max() == 0
        assert distance(absorbed, expanded) < 1e-5


# What decoding touches.


@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_decoding_never_expands_a_token(name, family, monkeypatch):
    model = tiny_model(family)
    calls = []
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    cache = new_cache(name, model.config, monkeypatch)
    model(tokens(2, 20), past_key_values=cache, use_cache=True)
    calls.clear()
    for new_tokens in (1, 1, 4, 1):  # 4: a verification step of speculative decoding
        model(tokens(2, new_tokens), past_key_values=cache, use_cache=True)
    assert calls == []


class LargestOutput(TorchDispatchMode):
    """Notes the number of values of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.numel())
        return output


@pytest.mark.parametrize("name", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_largest_tensor_of_a_decode_step(implementation, name):
    model = tiny_model(attn_implementation=implementation, num_attention_heads=32, num_hidden_layers=1)
    for length in (2048, 4096):
        cache = DynamicCache(config=model.config)
        if name == "static":
            cache = StaticCache(model.config, max_cache_len=length)
        cache.update(torch.randn(1, 1, length - 1, 32), torch.randn(1, 1, length - 1, 8), 0)
        with LargestOutput() as largest:
            model.model(tokens(1, 1), past_key_values=cache, use_cache=True)
        # 32 values a token: its latent in the cache, and its scores under 32 heads. Expanded keys would have 32 x 24.
        assert largest.values == 32 * length


# Layers that are more than a weight.


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")  # of SWIG modules
@torch.no_grad()
def test_absorbed_attention_under_an_adapter():
    from peft import LoraConfig, get_peft_model

    model = tiny_model(mla_path="absorbed")
    plain = model(tokens()).logits
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False))
    adapted.eval()
    unmerged = adapted(tokens()).logits
    model.config.mla_path = "expanded"
    expanded = adapted(tokens()).logits
    adapted.merge_adapter()
    model.config.mla_path = "absorbed"
    merged = adapted(tokens()).logits
    assert distance(unmerged, expanded) < 1e-5
    assert distance(merged, expanded) < 1e-5
    assert distance(unmerged, plain) > 0.1


@torch.no_grad()
def test_absorbed_attention_with_offloaded_weights():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_model(mla_path="absorbed")
    expected = model(tokens()).logits
    for layer in model.model.layers:
        projection = layer.self_attn.kv_b_proj
        hook = AlignDevicesHook("cpu", offload=True, weights_map={"weight": projection.weight.clone()})
        add_hook_to_module(projection, hook)  # from now on the weight is on `meta` outside the layer's forward
        assert projection.weight.is_meta
    assert distance(model(tokens()).logits, expected) < 1e-5


# flex_attention and flash_attention_2, with kernels that run here.


@pytest.fixture
def flex(monkeypatch):
    """flex_attention without torch.compile, which would take a minute. On CPU torch refuses its backward, so there
    are no gradients to compare."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)

    def plain(query, key, value, training=False, **kwargs):
        return torch_flex.flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", plain)
    create = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **kwargs: create(**{**kwargs, "_compile": False}))


@pytest.mark.parametrize("heads", [3, 4])  # a power of two takes another way through transformers' interface
@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_flex_attention(flex, path, heads):
    model = tiny_model(attn_implementation="flex_attention", num_attention_heads=heads)
    reference = tiny_model(attn_implementation="eager", num_attention_heads=heads)
    for name in WITHOUT_READY_MASKS:
        assert distance(run(model, path, BATCHES[name]), run_alone(reference, BATCHES[name])) < 1e-5, name


@pytest.fixture
def flash_calls(monkeypatch):
    """transformers' own flash interface over kernels made of sdpa; the list notes each kernel call."""
    calls = []

    def attend(query, key, value, softmax_scale):
        # As the real kernels: (tokens, heads, size), one head size for all three, mask aligned at the lower right.
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
        mask = torch.ones(query.shape[0], key.shape[0]).tril(key.shape[0] - query.shape[0]).bool()
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, mask, scale=softmax_scale).transpose(0, 1)

    def dense(query, key, value, softmax_scale, causal=True, dropout_p=0.0):
        calls.append("dense")
        return torch.stack([attend(*row, softmax_scale) for row in zip(query, key, value, strict=True)])

    def varlen(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal=True,
        dropout_p=0.0,
    ):  # fmt: skip
        calls.append("varlen")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q.diff().max() == max_seqlen_q
        assert cu_seqlens_k.diff().max() == max_seqlen_k
        ranges_q, ranges_k = (itertools.pairwise(bounds.tolist()) for bounds in (cu_seqlens_q, cu_seqlens_k))
        return torch.cat(
            [attend(query[q0:q1], key[k0:k1], value[k0:k1], softmax_scale)
             for (q0, q1), (k0, k1) in zip(ranges_q, ranges_k, strict=True)]
        )  # fmt: skip

    functions = (dense, varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    return calls


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_flash_attention(flash_calls, path):
    model = tiny_model(v_head_dim=12)
    reference = tiny_model(v_head_dim=12, attn_implementation="eager")
    model.config._attn_implementation = "flash_attention_2"  # not at construction, which asks for the real package
    for name in WITHOUT_READY_MASKS:
        if "static" in name:
            continue  # flash kernels would attend to the places that are still empty
        flash_calls.clear()
        assert distance(run(model, path, BATCHES[name]), run_alone(reference, BATCHES[name])) < 1e-5, name
        # The absorbed path has heads of C + R values, which no flash kernel takes.
        kernel = "dense" if name == "plain" else "varlen"
        assert flash_calls == ([kernel] * 3 if path == "expanded" else []), name


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generation_under_flash_attention(flash_calls, cache):
    model, reference = tiny_model(), tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    options = {"attention_mask": LEFT_MASK, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(tokens(2, LENGTH), cache_implementation=cache, **options)
    assert torch.equal(generated, reference.generate(tokens(2, LENGTH), **options))
    assert flash_calls == ["varlen"] * 3  # the prompt; every step after it is absorbed


# torch.compile cannot look into a mask, and must keep documents apart all the same.


@pytest.mark.filterwarnings(
    # torch's own tracing of vmap instantiates an autograd function, and warns about it.
    "ignore:.*should not be instantiated:DeprecationWarning"
)
@pytest.mark.parametrize("name", ["packed, cached", "packed, padded one by one"])
@torch.no_grad()
def test_packed_documents_in_a_compiled_model(name):
    torch.compiler.reset()
    model = tiny_model()
    batch = BATCHES[name]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits = compiled(tokens(2, LENGTH), **batch.inputs).logits
    actual = torch.cat([logits[row, start:stop] for row, start, stop in batch.spans])
    assert distance(actual, run_alone(model, batch)) < 1e-5
