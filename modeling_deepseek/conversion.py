"""The Hub's layout, in and out: one tensor for each expert, FP8 blocks, MTP modules behind the last layer.

In: `LoadingPlan` matches a checkpoint's tensors with a model's parameters before any is read, and says which is
missing, surplus or misshapen. What it returns is read one parameter at a time by transformers' loader, straight into
the dtype and shape of the model: experts into their stacked tensor, FP8 blocks through float32. Out: `hub_tensors`.

Legend: r rows, c columns of a weight; a block is 128 x 128 in every released checkpoint, and the grid of scales is
ceil(r / 128) x ceil(c / 128), so that the last blocks may be ragged.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional as F

from .configuration_deepseek import DeepseekConfig

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK_SIZE = (128, 128)
SCALE_SUFFIX = "_scale_inv"
# The weights that the released checkpoints hold in FP8: every matrix of a decoder layer but the router's and eh_proj.
FP8_WEIGHT = re.compile(r"layers\.\d+\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")
MTP_COPIES = re.compile(r"^layers\.(\d+)\.(embed_tokens|shared_head\.head)\.weight$")
OF_HEADS = re.compile(r"^(lm_head|score|classifier|qa_outputs)\.")
# What bitsandbytes saves beside a weight in 4 bits and in 8.
STATISTICS = re.compile(
    r"^(.+)\.(weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)|SCB|weight_format)$"
)
EXPERTS = re.compile(r"^(layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)$")


class CheckpointError(ValueError):
    """A checkpoint that does not fit its model: the text names the tensor and the file or folder."""


def scale_grid(shape: Iterable[int], block_size: tuple[int, int] = BLOCK_SIZE) -> tuple[int, int]:
    """Rows and columns of the scales of a weight: `scale_grid((576, 7168))` is (5, 56)."""
    rows, columns = shape
    return -(-rows // block_size[0]), -(-columns // block_size[1])


def spread_scales(scale: torch.Tensor, shape: torch.Size, block_size: tuple[int, int]) -> torch.Tensor:
    """Each block's scale at each of its weight's places, `shape`, padding cut off."""
    spread = scale.repeat_interleave(block_size[0], 0)[: shape[0]]
    return spread.repeat_interleave(block_size[1], 1)[:, : shape[1]]


def dequantize_blocks(
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    block_size: tuple[int, int] = BLOCK_SIZE,
) -> torch.Tensor:
    """fp8 * scale, (r, c), multiplied in float32 and rounded once, to `dtype`.

    Raises:
        ValueError: if `scale` is not the ceil grid of `weight`. Guessing a block size from the two shapes instead
            would load 192 rows with 2 scale rows as blocks of 96.
    """
    if tuple(scale.shape) != scale_grid(weight.shape, block_size):
        raise ValueError(
            f"scales of shape {tuple(scale.shape)} for a weight of shape {tuple(weight.shape)}: blocks of "
            f"{block_size[0]} x {block_size[1]} need {scale_grid(weight.shape, block_size)}"
        )
    return (weight.float() * spread_scales(scale.float(), weight.shape, block_size)).to(dtype)


def quantize_blocks(
    weight: torch.Tensor, block_size: tuple[int, int] = BLOCK_SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp8 e4m3 (r, c), float32 scales on the ceil grid): each block's largest magnitude becomes 448.

    Raises:
        ValueError: for a weight with values that are not finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("cannot be quantised to FP8: it has values that are not finite")
    rows, columns = weight.shape
    grid = scale_grid(weight.shape, block_size)
    padded = F.pad(weight.float(), [0, grid[1] * block_size[1] - columns, 0, grid[0] * block_size[0] - rows])
    largest = padded.abs().view(grid[0], block_size[0], grid[1], block_size[1]).amax(dim=(1, 3))
    # Below this a scale would be denormal and its inverse infinite; such a block is all zeros in effect.
    scale = (largest / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    quantized = weight.float() / spread_scales(scale, weight.shape, block_size)
    return quantized.clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, not yet read. `name` is the file's own."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16, F8_E4M3, ...
    handle: Any

    def read(self) -> torch.Tensor:
        return self.handle.get_tensor(self.name)

    def read_part(self, box: tuple[slice, ...]) -> torch.Tensor:
        return self.handle.get_slice(self.name)[box]

    def __str__(self) -> str:
        return f"{self.name} in {self.file}"


@dataclass(frozen=True)
class LazyParameter:
    """What transformers' loader takes for a tensor slice: indexing reads it, in final shape and dtype. A model that is
    spread over ranks asks for a box of slices, one an axis, and `read_part` reads no more than that from the file.
    `parts` are what a stack of experts is made of, by expert and projection; `statistics` belong to what bitsandbytes
    quantised, by name: "weight.absmax", "SCB", ..."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    read_part: Callable[[tuple[slice, ...]], torch.Tensor] | None = None
    stored_as: str = "F32"
    parts: tuple[tuple["LazyParameter", ...], ...] = ()
    statistics: dict[str, "LazyParameter"] = field(default_factory=dict)

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self.read_part is not None and isinstance(index, tuple) and len(index) == len(self.shape):
            return self.read_part(index)
        return self.read()[index]

    def get_dtype(self) -> str:
        return self.stored_as


def open_checkpoint(files: Iterable[str]) -> dict[str, StoredTensor]:
    """Every tensor of the safetensors `files` by name, none of them read.

    Raises:
        CheckpointError: for a file that is not there or ends early, naming what it should hold, and for a tensor that
            is in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if not os.path.exists(file):
            raise CheckpointError(f"{file} is missing{_what_the_index_says_of(file)}; fetch it again")
        header = _read_header(file)
        handle = safe_open(file, framework="pt")
        for name, entry in header.items():
            if name in tensors:
                raise CheckpointError(f"{name} is in two files, {tensors[name].file} and {file}; remove the wrong one")
            tensors[name] = StoredTensor(name, file, tuple(entry["shape"]), entry["dtype"], handle)
    return tensors


def _what_the_index_says_of(file: str) -> str:
    index = os.path.join(os.path.dirname(file), "model.safetensors.index.json")
    if not os.path.exists(index):
        return ""
    with open(index, encoding="utf-8") as stream:
        shards = json.load(stream)["weight_map"]
    names = [name for name, shard in shards.items() if shard == os.path.basename(file)]
    return f", which holds {some_of(names)}" if names else ""


def _read_header(file: str) -> dict[str, Any]:
    """The safetensors header: 8 bytes with its length, then JSON with each tensor's place behind it."""
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= size - 8:
            raise CheckpointError(f"{file} is truncated: it has {size} bytes, too few for its header; fetch it again")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if 8 + length + entry["data_offsets"][1] > size:
            raise CheckpointError(
                f"{file} is truncated: tensor {name} ends at byte {8 + length + entry['data_offsets'][1]} of a file "
                f"with {size}; fetch it again"
            )
    return header


def without_prefix(name: str) -> str:
    """Name of a tensor in the base model, whether or not the file or the model puts `model.` in front."""
    return name.removeprefix("model.")


def stored_mtp_modules(names: Iterable[str], num_hidden_layers: int) -> set[int]:
    """Numbers (from 0) of the layers behind the last one of which a checkpoint has any tensor."""
    layers = {int(match[1]) for name in names if (match := re.match(r"layers\.(\d+)\.", without_prefix(name)))}
    return {layer - num_hidden_layers for layer in layers if layer >= num_hidden_layers}


class LoadingPlan:
    """Matches stored tensors with parameters. `parameters` maps each parameter's name to a tensor of its shape and
    dtype (on any device, meta included); `optional` are those that may be missing (new heads, tied weights), and
    `quantized` those whose weights bitsandbytes has quantised in the file, empty where none is; `elsewhere` says of a
    stored tensor, without `model.` in front, that another stage of a pipeline loads it."""

    def __init__(
        self,
        config: DeepseekConfig,
        parameters: Mapping[str, torch.Tensor],
        stored: Mapping[str, StoredTensor],
        block_size: tuple[int, int] = BLOCK_SIZE,
        optional: Callable[[str], bool] = lambda name: False,
        any_shape: bool = False,
        quantized: Collection[str] = (),
        elsewhere: Callable[[str], bool] = lambda name: False,
    ):
        self.config = config
        self.quantized = {without_prefix(name) for name in quantized}
        self.beside: dict[str, list[str]] = {}  # names of bitsandbytes' statistics by the name of their weight
        self.block_size = block_size
        self.any_shape = any_shape
        self.elsewhere = elsewhere
        self.stored: dict[str, StoredTensor] = {}
        for name, tensor in stored.items():
            twin = self.stored.setdefault(without_prefix(name), tensor)
            if twin is not tensor:
                raise CheckpointError(f"{tensor} and {twin} are the same tensor of the model; remove the wrong one")
        for name in self.stored if self.quantized else ():
            if match := STATISTICS.match(name):
                self.beside.setdefault(f"{match[1]}.weight", []).append(name)
        self.prefixed = any(name.startswith("model.") for name in stored)
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.parameters: dict[str, LazyParameter] = {}
        for name, parameter in parameters.items():
            missing = len(self.missing)
            lazy = self._match(without_prefix(name), parameter.shape, parameter.dtype)
            if lazy is not None:
                self.parameters[name] = lazy
            elif optional(name):
                del self.missing[missing:]

    def with_statistics(self) -> dict[str, LazyParameter]:
        """`parameters`, and the statistics of those that are quantised in the file under names of their own."""
        named = dict(self.parameters)
        for name, parameter in self.parameters.items():
            for suffix, tensor in parameter.statistics.items():
                named[name.removesuffix("weight") + suffix] = tensor
        return named

    def raise_for_leftovers(self) -> None:
        """Raises `CheckpointError` for parameters without a tensor, and for tensors without a parameter."""
        files = {tensor.file for tensor in self.stored.values()}
        where = os.path.dirname(next(iter(files))) if files else "the checkpoint"
        if self.missing:
            missing = some_of([self._spelt(name) for name in self.missing])
            raise CheckpointError(
                f"{where} lacks {missing}, which its configuration calls for; fetch the file again, or correct the "
                "configuration"
            )
        surplus = [tensor.name for name, tensor in self.stored.items() if name not in self.used and self._is_odd(name)]
        if surplus:
            raise CheckpointError(
                f"{where} holds {some_of(surplus)}, for which the configured model has no place; correct the "
                "configuration, or remove them from the file"
            )

    def _spelt(self, name: str) -> str:
        """The name as the files would spell it."""
        return f"model.{name}" if self.prefixed and not OF_HEADS.match(name) else name

    def _is_odd(self, name: str) -> bool:
        """Whether a tensor that nothing asked for is an error: heads of other tasks, old rotary buffers and MTP
        modules that were not asked for are not."""
        if OF_HEADS.match(name) or name.endswith("rotary_emb.inv_freq") or self.elsewhere(name):
            return False
        layer = re.match(r"^layers\.(\d+)\.", name)
        if layer is None or f"layers.{layer[1]}.eh_proj.weight" not in self.stored:
            return True
        return int(layer[1]) < self.config.num_hidden_layers + self.config.num_nextn_predict_layers

    def _match(self, name: str, shape: torch.Size, dtype: torch.dtype) -> LazyParameter | None:
        experts = EXPERTS.match(name)
        if experts is None or name in self.stored:
            return self._single(name, shape, dtype)
        halves = ("gate_proj", "up_proj") if experts[2] == "gate_up_proj" else ("down_proj",)
        rows = shape[1] // len(halves)
        found = [
            [self._single(f"{experts[1]}.{expert}.{half}.weight", torch.Size((rows, shape[2])), dtype, stack=name)
             for half in halves]
            for expert in range(shape[0])
        ]  # fmt: skip
        parts = tuple(tuple(part for part in pair if part is not None) for pair in found)
        if any(len(pair) < len(halves) for pair in parts):
            return None

        def read_part(box: tuple[slice, ...]) -> torch.Tensor:
            experts, (start, stop, _), columns = parts[box[0]], box[1].indices(shape[1]), box[2]
            stacked = torch.empty(len(experts), stop - start, len(range(*columns.indices(shape[2]))), dtype=dtype)
            for expert, pair in enumerate(experts):
                for half, part in enumerate(pair):
                    first, last = max(start, half * rows), min(stop, (half + 1) * rows)
                    if first < last:
                        within = slice(first - half * rows, last - half * rows)
                        stacked[expert, first - start : last - start] = part[within, columns]
            return stacked

        return LazyParameter(tuple(shape), lambda: read_part((slice(None),) * 3), read_part, parts=parts)

    def _single(self, name: str, shape: torch.Size, dtype: torch.dtype, stack: str = "") -> LazyParameter | None:
        """The tensor `name`, whole or as a part of `stack`."""
        tensor = self.stored.get(name)
        if tensor is None:
            self.missing.append(name)
            return None
        self.used.add(name)
        if (stack or name) in self.quantized and (name in self.beside or not stack):
            return self._quantized(name, shape, tensor)
        if tensor.shape != tuple(shape) and (stack or not self.any_shape):
            raise CheckpointError(
                f"{tensor} has shape {tensor.shape}, but the configuration calls for {tuple(shape)}; correct whichever "
                "is wrong"
            )
        scale = self.stored.get(name + SCALE_SUFFIX)
        if tensor.dtype not in ("F64", "F32", "F16", "BF16", "F8_E4M3"):
            raise CheckpointError(f"{tensor} is stored as {tensor.dtype}, which is no format of these models' weights")
        if tensor.dtype != "F8_E4M3":
            # A scale beside it stays unused, and is surplus.
            return LazyParameter(
                tensor.shape, lambda: tensor.read().to(dtype), lambda box: tensor.read_part(box).to(dtype), tensor.dtype
            )
        if scale is None:
            raise CheckpointError(f"{tensor} is in FP8, but its scales {tensor.name + SCALE_SUFFIX} are missing")
        self.used.add(name + SCALE_SUFFIX)
        if scale.shape != scale_grid(tensor.shape, self.block_size):
            raise CheckpointError(
                f"{scale} has shape {scale.shape}, but the weight's {tensor.shape} in blocks of {self.block_size} "
                f"call for {scale_grid(tensor.shape, self.block_size)}; a wrong grid cannot be loaded"
            )
        return LazyParameter(
            tensor.shape, lambda: dequantize_blocks(tensor.read(), scale.read(), dtype, self.block_size)
        )

    def _quantized(self, name: str, shape: torch.Size, tensor: StoredTensor) -> LazyParameter:
        """A weight that bitsandbytes has quantised, and its statistics, as they are in the file."""
        beside = self.beside.get(name, [])
        module = name.removesuffix("weight")
        statistics = {
            other.removeprefix(module): LazyParameter(
                self.stored[other].shape, self.stored[other].read, stored_as=self.stored[other].dtype
            )
            for other in beside
        }
        if "SCB" in statistics:
            complete, fits = True, tensor.shape == tuple(shape)
        else:
            complete = "weight.absmax" in statistics and any(".quant_state." in other for other in beside)
            n_bytes = math.prod(tensor.shape) * {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}.get(tensor.dtype, 1)
            fits = n_bytes == -(-math.prod(shape) // 2)
        if not complete:
            raise CheckpointError(
                f"{tensor} should be quantised, but what bitsandbytes saves with it is missing or incomplete "
                f"({some_of(beside) or 'nothing is there'}); fetch the file again, or name the layer in "
                "`llm_int8_skip_modules` of the configuration if it is stored whole"
            )
        if not fits:
            raise CheckpointError(
                f"{tensor} has shape {tensor.shape} ({tensor.dtype}), but a quantised matrix of {tuple(shape)} is "
                "called for; correct the file or its configuration"
            )
        self.used.update(beside)
        return LazyParameter(tensor.shape, tensor.read, stored_as=tensor.dtype, statistics=statistics)

    def check_mtp_copies(self) -> None:
        """The file's copies of the shared embedding and head must be copies, since only the shared ones are loaded.

        Raises:
            CheckpointError: naming a copy that differs from what it copies.
        """
        for name, copy in self.stored.items():
            match = MTP_COPIES.match(name)
            layers = self.config.num_hidden_layers + self.config.num_nextn_predict_layers
            if match is None or int(match[1]) >= layers:
                continue
            self.used.add(name)
            shared = self.stored.get("lm_head.weight" if "head" in match[2] else "embed_tokens.weight")
            if shared is None and self.config.tie_word_embeddings:
                shared = self.stored.get("embed_tokens.weight")
            if shared is not None and not torch.equal(copy.read(), shared.read()):
                raise CheckpointError(
                    f"{copy} differs from {shared.name}, which the model shares with its MTP modules; such a "
                    "checkpoint can be loaded without the modules only: `num_nextn_predict_layers=0`"
                )


def some_of(names: list[str]) -> str:
    """The first three names, and how many more there are, for an error."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def hub_tensors(
    config: DeepseekConfig, state_dict: Mapping[str, torch.Tensor], fp8: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """The state of a model as the Hub's tensors: experts one by one, the shared embedding and head copied into each
    MTP module, and with `fp8` the matrices of the layers in blocks, each followed by its scales."""
    embedding = state_dict.get("model.embed_tokens.weight", state_dict.get("embed_tokens.weight"))
    head = state_dict.get("lm_head.weight", embedding if config.tie_word_embeddings else None)
    for name, tensor in state_dict.items():
        prefix = name[: len(name) - len(without_prefix(name))]
        for hub_name, part in _one_by_one(without_prefix(name), tensor):
            if fp8 and FP8_WEIGHT.search(hub_name):
                try:
                    quantized, scale = quantize_blocks(part)
                except ValueError as error:
                    raise ValueError(f"{prefix}{hub_name} {error}") from error
                yield prefix + hub_name, quantized
                yield prefix + hub_name + SCALE_SUFFIX, scale
            else:
                yield prefix + hub_name, part
        if name.endswith(".eh_proj.weight"):
            module = name.removesuffix("eh_proj.weight")
            # Clones: a safetensors file holds no two names for one tensor.
            if embedding is not None:
                yield module + "embed_tokens.weight", embedding.clone()
            if head is not None:
                yield module + "shared_head.head.weight", head.clone()


def _one_by_one(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    experts = EXPERTS.match(name)
    if experts is None:
        yield name, tensor
        return
    for expert, fused in enumerate(tensor):
        parts = fused.chunk(2) if experts[2] == "gate_up_proj" else (fused,)
        names = ("gate_proj", "up_proj") if experts[2] == "gate_up_proj" else ("down_proj",)
        for half, part in zip(names, parts, strict=True):
            yield f"{experts[1]}.{expert}.{half}.weight", part.clone()
