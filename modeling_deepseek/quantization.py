"""Routed experts in 4 and 8 bits. bitsandbytes and transformers quantise linear layers and would leave the stacks of
experts, 97 % of V3, as they are; with `quantization_config=BitsAndBytesConfig(...)` these modules take their place.

Each expert's `gate_proj`, `up_proj` and `down_proj` is quantised by bitsandbytes on its own, so that the bits are those
of its `Linear4bit` and `Linear8bitLt`, and are saved one by one under the names that these have: `weight`,
`weight.absmax`, `weight.quant_state.bitsandbytes__nf4`, ... or `weight`, `SCB`, `weight_format`. In memory they lie in
stacks. A product dequantises a bounded group of experts that have rows, never a whole layer's stack where that is
large, and so does its backward pass: what autograd keeps is the quantised stack that is there anyway.

bitsandbytes is imported where it is used: this file travels with checkpoints to machines that may not have it.

Legend: E routed experts, N rows sorted by expert, O outputs and I inputs of a product, M matrices that are stacked in
one tensor (2 for gate_up_proj, 1 for down_proj), G experts of a group, D hidden size, F expert width.
"""

import copy
import ctypes
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.accelerate import get_device
from transformers.integrations.moe import _grouped_linear
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from .conversion import LazyParameter
from .moe import DeepseekExperts, run_experts

# Dequantised weights that a product may hold at a time, in bytes: 4 of V3's experts in bfloat16, 23 of V2-Lite's.
WORKSPACE = 2**28
# On CPU one expert of V2-Lite: the C library hands out such a size again, instead of mapping fresh pages for it.
CPU_WORKSPACE = 2**24
# On CUDA bitsandbytes multiplies so many rows without writing the weight out.
FUSED_ROWS = 4
# Values quantised at a time on CPU, where bitsandbytes takes some 20 bytes of workspace for each.
_CHUNK = 2**18
_HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Left alone besides the heads, unless `llm_int8_skip_modules` says what is: absorbed decoding reads this weight, not
# its product, and would dequantise it for each token. It is 0.2 % of V3 and 0.4 % of V2-Lite.
_WHOLE = ["lm_head", "score", "kv_b_proj"]


def bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes")


def release_freed_memory(device: torch.device) -> None:
    """Gives pages of freed tensors back to the system, if it was on the CPU that something was quantised: glibc keeps
    them between tensors that live on, up to the size of the model and more."""
    on_cpu = device.type == "cpu" and sys.platform == "linux"
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if on_cpu else None
    if trim is not None:
        trim(0)


def is_bitsandbytes(quantization_config: Any) -> bool:
    """Whether this `quantization_config`, an object or the dictionary of a config.json, is one of bitsandbytes."""
    if isinstance(quantization_config, Mapping):
        old_style = quantization_config.get("load_in_4bit") or quantization_config.get("load_in_8bit")
        return quantization_config.get("quant_method") == "bitsandbytes" or bool(old_style)
    return getattr(quantization_config, "quant_method", None) == "bitsandbytes"


def skipping_by_default(quantization_config: Any) -> Any:
    """A copy, as an object, for a model that is quantised while it is loaded, in which `llm_int8_skip_modules`, if it
    is None, names the heads and kv_b_proj. It is saved with the model, so that the same layers are quantised when it is
    read again."""
    if isinstance(quantization_config, Mapping):
        quantization_config = BitsAndBytesConfig.from_dict(dict(quantization_config))
    quantization_config = copy.deepcopy(quantization_config)
    if quantization_config.llm_int8_skip_modules is None:
        quantization_config.llm_int8_skip_modules = list(_WHOLE)
    return quantization_config


def quantize_4bit(
    weight_OI: torch.Tensor, quant_type: str, double_quant: bool, quant_storage: torch.dtype
) -> tuple[torch.Tensor, Any]:
    """bitsandbytes' function of this name, on CPU with a bounded workspace: (packed values, `QuantState`)."""
    functional = bitsandbytes().functional
    kwargs = {"quant_type": quant_type, "quant_storage": quant_storage}
    flat = weight_OI.contiguous().view(-1)
    if flat.device.type != "cpu" or flat.numel() <= _CHUNK:
        return functional.quantize_4bit(weight_OI, compress_statistics=double_quant, **kwargs)
    parts = [functional.quantize_4bit(part, **kwargs) for part in flat.split(_CHUNK)]
    state = parts[0][1]
    state.absmax, state.shape = torch.cat([part.absmax for _, part in parts]), weight_OI.shape
    if double_quant:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(state.absmax - state.offset, blocksize=256)
        state.nested = True
    return torch.cat([packed for packed, _ in parts]), state


class DeepseekQuantizedExperts(nn.Module):
    """Stands where `moe.DeepseekExperts` would. `shapes` are those of the tensors it holds quantised: `gate_up_proj`
    (E, 2F, D) and `down_proj` (E, D, F)."""

    compute_dtype: torch.dtype | None = None

    def __init__(self, experts: DeepseekExperts):
        super().__init__()
        self.num_experts = experts.num_experts
        self.act_fn = experts.act_fn
        self.shapes = {name: tuple(getattr(experts, name).shape) for name in _HALVES}
        self.dtype = experts.down_proj.dtype  # that of what is quantised, and of what `dequantize` gives back

    def forward(self, hidden_TD: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return run_experts(self.project, self.act_fn, self.num_experts, hidden_TD, top_k_index, top_k_weights)

    def project(self, name: str, rows_NI: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        """One of the two matrix products, as `moe.run_experts` asks for it: (N, O) in the dtype of the rows."""
        rows = rows_NI if self.compute_dtype is None else rows_NI.to(self.compute_dtype)
        return _FrozenProduct.apply(rows, offsets_E, self, name).to(rows_NI.dtype)

    def multiply(self, name: str, rows: torch.Tensor, offsets_E: torch.Tensor, transposed: bool) -> torch.Tensor:
        """(N, I) to (N, O), or back if `transposed`, without a graph."""
        ends = offsets_E.tolist()
        starts = [0, *ends[:-1]]
        active = [expert for expert in range(self.num_experts) if starts[expert] < ends[expert]]
        outputs, inputs = self.shapes[name][1:]
        workspace = CPU_WORKSPACE if rows.device.type == "cpu" else WORKSPACE
        result = rows.new_zeros(rows.shape[0], inputs if transposed else outputs)
        with torch.autocast(rows.device.type, enabled=False):  # or the products would be in its dtype after all
            if not transposed and len(rows) <= len(active) * self.fused_rows(name, rows.device):
                for expert in active:
                    some = slice(starts[expert], ends[expert])
                    result[some] = self.fused_product(name, expert, rows[some])
                return result
            for group in _chunks(active, max(1, workspace // (outputs * inputs * rows.element_size()))):
                some = slice(starts[group[0]], ends[group[-1]])
                weight_GOI = self.factor(name, group, rows.dtype)
                offsets_G = torch.tensor([ends[expert] - some.start for expert in group], dtype=torch.int32)
                result[some] = _grouped_linear(
                    rows[some], weight_GOI, offsets_G.to(rows.device), is_transposed=transposed
                )
        return result

    def fused_rows(self, name: str, device: torch.device) -> int:
        """Rows for each expert up to which `fused_product` is the faster way, 0 where there is none."""
        return 0

    def fused_product(self, name: str, expert: int, rows_NI: torch.Tensor) -> torch.Tensor:
        """(N, O) by a kernel that reads the quantised weight itself."""
        raise NotImplementedError

    def factor(self, name: str, experts: list[int], dtype: torch.dtype) -> torch.Tensor:
        """What `multiply` takes for the weights (G, O, I) of these experts."""
        return self.dequantized(name, experts, dtype)

    def dequantized(self, name: str, experts: list[int], dtype: torch.dtype) -> torch.Tensor:
        """The weights (G, O, I) of these experts."""
        raise NotImplementedError

    def put(self, name: str, expert: int, half: int, weight: torch.Tensor, statistics: Any) -> None:
        """Stores one quantised matrix in the stacks."""
        raise NotImplementedError

    def quantize(self, weight_OI: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """A matrix as bitsandbytes quantises it, on the device where it is: what `put` takes."""
        raise NotImplementedError

    def restore(self, weight: torch.Tensor, statistics: dict[str, torch.Tensor], device: torch.device) -> tuple:
        """What `put` takes, from a matrix's tensors in a file."""
        raise NotImplementedError

    def stored_as(self, name: str, expert: int, half: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of one matrix as bitsandbytes' linear layers are saved: `weight` and what belongs to it."""
        raise NotImplementedError

    @torch.no_grad()
    def load(self, name: str, stored: LazyParameter, device: torch.device) -> None:
        """Fills the stack `name`, matrix by matrix, with what is quantised in the file or is quantised here."""
        halves = len(_HALVES[name])
        if not stored.parts:  # the file holds the experts stacked: a mapped file is not copied by reading it whole
            for expert, stack in enumerate(stored[...]):
                for half, weight in enumerate(stack.chunk(halves)):
                    self.put(name, expert, half, *self.quantize(weight.to(device, self.dtype)))
        for expert, parts in enumerate(stored.parts):
            for half, part in enumerate(parts):
                if part.statistics:
                    statistics = {suffix: tensor[...] for suffix, tensor in part.statistics.items()}
                    self.put(name, expert, half, *self.restore(part[...], statistics, device))
                else:
                    self.put(name, expert, half, *self.quantize(part[...].to(device, self.dtype)))
            release_freed_memory(device)

    def hub_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each expert's tensors, as copies: a file holds no two names for one tensor."""
        for name, halves in _HALVES.items():
            for expert in range(self.num_experts):
                for half, projection in enumerate(halves):
                    for suffix, tensor in self.stored_as(name, expert, half):
                        yield f"{expert}.{projection}.{suffix}", tensor.clone()


class _FrozenProduct(torch.autograd.Function):
    """Rows times the quantised weights of their experts. Backward dequantises once more instead of keeping them."""

    @staticmethod
    def forward(ctx, rows_NI, offsets_E, experts, name):
        ctx.experts, ctx.name = experts, name
        ctx.save_for_backward(offsets_E)
        return experts.multiply(name, rows_NI, offsets_E, transposed=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NO):
        (offsets_E,) = ctx.saved_tensors
        return ctx.experts.multiply(ctx.name, grad_NO, offsets_E, transposed=True), None, None, None


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


class DeepseekExperts4bit(DeepseekQuantizedExperts):
    """Experts in NF4 or FP4. Each name of `shapes` is a `Params4bit` of packed values (E, M, bytes) with a `QuantState`
    whose tensors are stacked alike: `absmax` (E, M, blocks of 64 values) in float32, or under double quantisation in
    8 bits with `state2.absmax` (E, M, blocks of 256 blocks) and `offset` (E, M) in float32."""

    def __init__(self, experts: DeepseekExperts, quantization_config: Any):
        super().__init__(experts)
        self.compute_dtype = quantization_config.bnb_4bit_compute_dtype
        self.quant_type = quantization_config.bnb_4bit_quant_type
        self.quant_storage = quantization_config.bnb_4bit_quant_storage
        self.double_quant = quantization_config.bnb_4bit_use_double_quant
        for name in _HALVES:
            n_bytes = -(-self._values(name) // 2)
            packed = torch.empty(
                self.num_experts, len(_HALVES[name]), n_bytes // self.quant_storage.itemsize, dtype=self.quant_storage,
                device="meta",
            )  # fmt: skip
            # Under this class `num_parameters`, PEFT and FSDP know what the bytes stand for.
            setattr(self, name, bitsandbytes().nn.Params4bit(packed, bnb_quantized=True))

    def _values(self, name: str) -> int:
        """Values of one of the stacked matrices."""
        _, outputs, inputs = self.shapes[name]
        return outputs * inputs // len(_HALVES[name])

    def quantize(self, weight_OI: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return quantize_4bit(weight_OI, self.quant_type, self.double_quant, self.quant_storage)

    def put(self, name: str, expert: int, half: int, weight: torch.Tensor, statistics: Any) -> None:
        parameter = getattr(self, name)
        if parameter.quant_state is None:
            parameter = self._allocate(name, statistics, weight.device)
        state = parameter.quant_state
        same = (state.blocksize, state.quant_type, state.nested, state.dtype)
        other = (statistics.blocksize, statistics.quant_type, statistics.nested, statistics.dtype)
        if same != other or tuple(statistics.shape) != tuple(state.shape):
            raise ValueError(
                f"the {_HALVES[name][half]} of expert {expert} is quantised as {other} with shape "
                f"{tuple(statistics.shape)}, but the experts before it as {same} with shape {tuple(state.shape)}; the "
                "experts of a layer must be quantised alike"
            )
        parameter.data[expert, half] = weight.view(-1)
        state.absmax[expert, half] = statistics.absmax
        if state.nested:
            state.offset[expert, half] = statistics.offset
            state.state2.absmax[expert, half] = statistics.state2.absmax

    def _allocate(self, name: str, like: Any, device: torch.device) -> nn.Parameter:
        """Empty stacks for matrices that are quantised as the `QuantState` `like`."""
        bnb, meta = bitsandbytes(), getattr(self, name)

        def stack(one: torch.Tensor) -> torch.Tensor:
            return torch.empty(*meta.shape[:2], *one.shape, dtype=one.dtype, device=device)

        state = bnb.functional.QuantState(
            absmax=stack(like.absmax), shape=like.shape, code=like.code, blocksize=like.blocksize,
            quant_type=like.quant_type, dtype=like.dtype,
        )  # fmt: skip
        if like.nested:
            state.nested, state.offset = True, stack(like.offset)
            state.state2 = bnb.functional.QuantState(
                absmax=stack(like.state2.absmax), code=like.state2.code, blocksize=like.state2.blocksize,
                dtype=like.state2.dtype,
            )  # fmt: skip
        packed = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        parameter = bnb.nn.Params4bit(
            packed, quant_state=state, blocksize=like.blocksize, compress_statistics=like.nested,
            quant_type=like.quant_type, quant_storage=meta.dtype, bnb_quantized=True,
        )  # fmt: skip
        parameter._is_hf_initialized = True
        setattr(self, name, parameter)
        return parameter

    def one_state(self, name: str, expert: int, half: int) -> Any:
        """The `QuantState` of one matrix, views of the stacks."""
        functional, state = bitsandbytes().functional, getattr(self, name).quant_state
        one = functional.QuantState(
            absmax=state.absmax[expert, half], shape=state.shape, code=state.code, blocksize=state.blocksize,
            quant_type=state.quant_type, dtype=state.dtype,
        )  # fmt: skip
        if state.nested:
            one.nested, one.offset = True, state.offset[expert, half]
            one.state2 = functional.QuantState(
                absmax=state.state2.absmax[expert, half], code=state.state2.code, blocksize=state.state2.blocksize,
                dtype=state.state2.dtype,
            )  # fmt: skip
        return one

    def absmax(self, name: str, experts: list[int]) -> torch.Tensor:
        """Scales of the blocks (G, M, blocks) in float32, as bitsandbytes' dequantize_4bit undoes the second
        quantisation."""
        state = getattr(self, name).quant_state
        absmax = _select(state.absmax, experts)
        if not state.nested:
            return absmax
        blocks = absmax.shape[-1]
        spread = _select(state.state2.absmax, experts).repeat_interleave(state.state2.blocksize, dim=-1)[..., :blocks]
        return state.state2.code[absmax.int()] * spread + _select(state.offset, experts)[..., None]

    def dequantized(self, name: str, experts: list[int], dtype: torch.dtype) -> torch.Tensor:
        functional, parameter = bitsandbytes().functional, getattr(self, name)
        state = parameter.quant_state
        packed, absmax = _select(parameter.data, experts), self.absmax(name, experts)
        outputs, inputs = self.shapes[name][1:]

        def undo(packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
            one = functional.QuantState(
                absmax=absmax.reshape(-1),
                shape=torch.Size(shape),
                blocksize=state.blocksize,
                quant_type=state.quant_type,
                dtype=dtype,
            )
            return functional.dequantize_4bit(packed.reshape(-1, 1), one)

        n_values = self._values(name)
        if n_values % state.blocksize:  # then each matrix ends in a block of its own
            pairs = zip(packed.flatten(0, 1), absmax.flatten(0, 1), strict=True)
            return torch.cat([undo(*pair, (1, n_values)) for pair in pairs]).view(-1, outputs, inputs)
        # One block in a row: of rows of 32 or 96 values bitsandbytes 0.50 takes wrong scales, on CPUs with AVX-512.
        return undo(packed, absmax, (absmax.numel(), state.blocksize)).view(-1, outputs, inputs)

    def fused_rows(self, name: str, device: torch.device) -> int:
        whole_blocks = self._values(name) % getattr(self, name).quant_state.blocksize == 0
        return FUSED_ROWS if device.type == "cuda" and whole_blocks else 0

    def fused_product(self, name: str, expert: int, rows_NI: torch.Tensor) -> torch.Tensor:
        bnb, parameter = bitsandbytes(), getattr(self, name)
        one = bnb.functional.QuantState(
            absmax=self.absmax(name, [expert]).reshape(-1),
            shape=torch.Size(self.shapes[name][1:]),
            blocksize=parameter.quant_state.blocksize,
            quant_type=parameter.quant_state.quant_type,
            dtype=rows_NI.dtype,
        )
        return bnb.matmul_4bit(rows_NI, parameter.data[expert].reshape(-1, 1), one)

    def stored_as(self, name: str, expert: int, half: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield "weight", getattr(self, name)[expert, half].view(-1, 1)
        for suffix, tensor in self.one_state(name, expert, half).as_dict(packed=True).items():
            yield f"weight.{suffix}", tensor

    def restore(self, weight: torch.Tensor, statistics: dict[str, torch.Tensor], device: torch.device) -> tuple:
        state = bitsandbytes().functional.QuantState.from_dict(
            {name.removeprefix("weight."): tensor for name, tensor in statistics.items()}, device
        )
        return weight.to(device), state

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _HALVES:
            for suffix, tensor in self._stacked_statistics(name).items():
                destination[f"{prefix}{name}.{suffix}"] = tensor

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in _HALVES:
            for suffix, tensor in self._stacked_statistics(name).items():
                saved = state_dict.pop(f"{prefix}{name}.{suffix}", None)
                if saved is not None:
                    tensor.copy_(saved)
                elif f"{prefix}{name}" in state_dict:
                    args[2].append(f"{prefix}{name}.{suffix}")  # missing_keys, after local_metadata and strict
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _stacked_statistics(self, name: str) -> dict[str, torch.Tensor]:
        state = getattr(self, name).quant_state
        if state is None:  # not loaded yet
            return {}
        if not state.nested:
            return {"absmax": state.absmax}
        return {"absmax": state.absmax, "nested_absmax": state.state2.absmax, "nested_offset": state.offset}


class DeepseekExperts8bit(DeepseekQuantizedExperts):
    """Experts in int8, one scale for each row (LLM.int8). Each name of `shapes` is an int8 parameter of that shape,
    with the rows' largest magnitudes `SCB` (E, rows) in float32 beside it.

    The rows of a product stay in their dtype: bitsandbytes' layers quantise them as well, in inference on CUDA and CPU,
    but not in training on CPU, and hold back outliers that this would crush; here nothing is crushed.
    """

    def __init__(self, experts: DeepseekExperts, quantization_config: Any):
        super().__init__(experts)
        for name, shape in self.shapes.items():
            values = torch.empty(shape, dtype=torch.int8, device="meta")
            setattr(self, name, nn.Parameter(values, requires_grad=False))
            self.register_buffer(f"{name}_SCB", torch.empty(shape[:2], dtype=torch.float32, device="meta"))

    def _apply(self, fn, recurse=True):
        scales = {name: getattr(self, f"{name}_SCB") for name in _HALVES}
        super()._apply(fn, recurse)
        for name, before in scales.items():  # `model.half()` must not round them
            after = getattr(self, f"{name}_SCB")
            if after.dtype != torch.float32:
                setattr(self, f"{name}_SCB", before.to(after.device))
        return self

    def quantize(self, weight_OI: torch.Tensor) -> tuple[torch.Tensor, Any]:
        values, scale_O, _ = bitsandbytes().functional.int8_vectorwise_quant(weight_OI.to(torch.float16))
        return values, scale_O

    def put(self, name: str, expert: int, half: int, weight: torch.Tensor, statistics: Any) -> None:
        if getattr(self, name).is_meta:
            values = torch.empty(self.shapes[name], dtype=torch.int8, device=weight.device)
            parameter = nn.Parameter(values, requires_grad=False)
            scales = torch.empty(self.shapes[name][:2], dtype=torch.float32, device=weight.device)
            parameter._is_hf_initialized = scales._is_hf_initialized = True  # type: ignore[attr-defined]
            setattr(self, name, parameter)
            setattr(self, f"{name}_SCB", scales)
        rows = self.shapes[name][1] // len(_HALVES[name])
        some = slice(half * rows, (half + 1) * rows)
        getattr(self, name).data[expert, some] = weight
        getattr(self, f"{name}_SCB")[expert, some] = statistics

    def multiply(self, name: str, rows: torch.Tensor, offsets_E: torch.Tensor, transposed: bool) -> torch.Tensor:
        if rows.dtype == torch.float16:  # in which 127 times the product would be infinite
            return super().multiply(name, rows, offsets_E, transposed)
        # int8 values are exact in bfloat16. A scale belongs to an output: it multiplies outputs, not the weight.
        rows_N = torch.arange(len(rows), device=rows.device, dtype=offsets_E.dtype)
        expert_N = torch.searchsorted(offsets_E, rows_N, right=True).clamp(max=self.num_experts - 1)
        scale_NO = getattr(self, f"{name}_SCB")[expert_N] * (1 / 127)
        if transposed:
            return super().multiply(name, (rows * scale_NO).to(rows.dtype), offsets_E, transposed)
        return (super().multiply(name, rows, offsets_E, transposed) * scale_NO).to(rows.dtype)

    def factor(self, name: str, experts: list[int], dtype: torch.dtype) -> torch.Tensor:
        values = _select(getattr(self, name).data, experts)
        return self.dequantized(name, experts, dtype) if dtype == torch.float16 else values.to(dtype)

    def dequantized(self, name: str, experts: list[int], dtype: torch.dtype) -> torch.Tensor:
        scale = _select(getattr(self, f"{name}_SCB"), experts)[..., None] * (1 / 127)
        return (_select(getattr(self, name).data, experts) * scale).to(dtype)

    def stored_as(self, name: str, expert: int, half: int) -> Iterator[tuple[str, torch.Tensor]]:
        halves = len(_HALVES[name])
        yield "weight", getattr(self, name)[expert].chunk(halves)[half]
        yield "SCB", getattr(self, f"{name}_SCB")[expert].chunk(halves)[half]
        yield "weight_format", torch.tensor(0, dtype=torch.uint8)  # rows first, the only one there is

    def restore(self, weight: torch.Tensor, statistics: dict[str, torch.Tensor], device: torch.device) -> tuple:
        return weight.to(device), statistics["SCB"].to(device)


def _select(stack: torch.Tensor, experts: list[int]) -> torch.Tensor:
    """The given experts' part of a stack; no copy where they are neighbours."""
    first, last = experts[0], experts[-1]
    if last - first + 1 == len(experts):
        return stack[first : last + 1]
    return stack[torch.tensor(experts, device=stack.device)]


def replace_experts(model: Any, quantization_config: Any) -> None:
    """Puts modules for quantised experts, still empty, in the place of a model's experts on the meta device, unless
    `llm_int8_skip_modules` names them.

    Raises:
        ValueError: for skipped modules that are some of a layer's experts or some of their matrices, and for
            `llm_int8_has_fp16_weight`.
    """
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, quantization_config.llm_int8_skip_modules, model._keep_in_fp32_modules
    )
    if quantization_config.load_in_8bit and quantization_config.llm_int8_has_fp16_weight:
        raise ValueError(
            "`llm_int8_has_fp16_weight=True` keeps 16-bit weights and quantises them in each forward pass, which "
            'routed experts cannot do; leave it out, or skip the experts: `llm_int8_skip_modules=["experts", ...]`'
        )
    for path, module in list(model.named_modules()):
        if isinstance(module, DeepseekExperts) and not _is_skipped(path, module.num_experts, skipped):
            kind = DeepseekExperts4bit if quantization_config.load_in_4bit else DeepseekExperts8bit
            model.set_submodule(path, kind(module, quantization_config))
        # On CPUs with AVX512-BF16, bitsandbytes rearranges such a layer in its first inference, with scales rounded to
        # bfloat16. After that it gives no gradient to its input, and `save_pretrained` writes scales in wrong places.
        elif hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _is_skipped(path: str, n_experts: int, skipped: list[str]) -> bool:
    if not should_convert_module(path, skipped):
        return True
    matrices = [
        f"{path}.{expert}.{half}" for expert in range(n_experts) for halves in _HALVES.values() for half in halves
    ]
    left = [matrix for matrix in matrices if not should_convert_module(matrix, skipped)]
    if left and len(left) < len(matrices):
        raise ValueError(
            f"`llm_int8_skip_modules` leaves out {left[0]} and quantises others of these experts; they are quantised "
            f"together or not at all: leave the pattern out, or skip {path!r}"
        )
    return bool(left)


def restore_experts(model: Any, dtype: torch.dtype) -> None:
    """Puts plain experts with the dequantised weights in the place of quantised ones."""
    for path, module in list(model.named_modules()):
        if isinstance(module, DeepseekQuantizedExperts):
            with torch.device("meta"):
                plain = DeepseekExperts(model.config)
            for name in _HALVES:
                stack = torch.empty(module.shapes[name], dtype=dtype, device=getattr(module, name).device)
                for expert in range(module.num_experts):
                    stack[expert] = module.dequantized(name, [expert], module.dtype)[0]
                setattr(plain, name, nn.Parameter(stack))
            model.set_submodule(path, plain.train(module.training))


def quantized_experts(model: nn.Module) -> dict[str, tuple[DeepseekQuantizedExperts, str]]:
    """The module and the name in it of each quantised stack of experts, by the stack's path."""
    return {
        f"{path}.{name}": (module, name)
        for path, module in model.named_modules()
        if isinstance(module, DeepseekQuantizedExperts)
        for name in _HALVES
    }


def quantized_while_loaded(model: nn.Module, quantizer: Any) -> dict[str, tuple[Any, str]]:
    """Module and name of each parameter that `load_quantized` has to load, by its path: stacks of experts, and the
    weights of linear layers that are quantised to 4 bits now, for which transformers takes a workspace of ten times the
    weight."""
    found: dict[str, tuple[Any, str]] = dict(quantized_experts(model))
    if not quantizer.pre_quantized and quantizer.quantization_config.load_in_4bit:
        for path, module in model.named_modules():
            if isinstance(module, bitsandbytes().nn.Linear4bit):
                found[f"{path}.weight"] = module, "weight"
    return found


def load_quantized(module: Any, name: str, stored: LazyParameter, device: torch.device) -> None:
    """Loads one of `quantized_while_loaded`."""
    if isinstance(module, DeepseekQuantizedExperts):
        module.load(name, stored, device)
        return
    old = module.weight
    packed, state = quantize_4bit(stored[...].to(device), old.quant_type, old.compress_statistics, old.quant_storage)
    module.quant_state = state
    module.weight = bitsandbytes().nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=module,
        bnb_quantized=True,
    )
    module.weight._is_hf_initialized = module._is_hf_initialized = True
    release_freed_memory(device)


def unquantized(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state, with stacks of experts of full shape and dtype, on the meta device, for quantised ones."""
    stacks = quantized_experts(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(stacks))}
    for path, (module, name) in stacks.items():
        state[path] = torch.empty(module.shapes[name], dtype=module.dtype, device="meta")
    return state


def one_by_one(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state with each quantised expert's tensors under the names that bitsandbytes' layers would have."""
    modules = {path: module for path, module in model.named_modules() if isinstance(module, DeepseekQuantizedExperts)}
    prefixes = tuple(f"{path}." for path in modules)
    state = {name: tensor for name, tensor in state_dict.items() if not name.startswith(prefixes)}
    for path, module in modules.items():
        state |= {f"{path}.{name}": tensor for name, tensor in module.hub_tensors()}
    return state


def device_of(path: str, device_map: dict[str, Any] | None) -> torch.device:
    """Where `device_map` puts a stack of experts.

    Raises:
        ValueError: if that is the CPU or the disk and the map uses accelerators.
    """
    device_map = device_map or {"": "cpu"}
    device = get_device(device_map, path)
    offloads = len({str(place) for place in device_map.values()} - {"cpu", "disk"}) > 0
    if str(device) == "disk" or (str(device) == "cpu" and offloads):
        raise ValueError(
            f"`device_map` puts {path} on {device}, but quantised experts stay on the device where they are used: use "
            "a map without it (all on the CPU works too), or leave the experts of that layer unquantised by "
            "`llm_int8_skip_modules`"
        )
    return torch.device(device if not isinstance(device, int) else f"cuda:{device}")


def statistics_bytes(model: nn.Module) -> int:
    """Bytes of the scales that bitsandbytes keeps outside of parameters and buffers."""
    total = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                total += state.absmax.nbytes
                if state.nested:
                    total += state.state2.absmax.nbytes + state.offset.nbytes
        scale = getattr(getattr(module, "weight", None), "SCB", None)
        if scale is None:
            scale = getattr(getattr(module, "state", None), "SCB", None)
        total += scale.nbytes if isinstance(scale, torch.Tensor) else 0
    return total
