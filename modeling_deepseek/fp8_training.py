"""Training with matrix products in FP8: linear layers by torchao, the routed experts by the functions below.

Through accelerate, which converts the linear layers in `prepare`:

    convert_experts(model)
    accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[accelerate_recipe()])

or everything at once, for `Trainer(..., bf16=True)`, TRL and loops of one's own:

    convert_to_fp8_training(model)

As in V3 (arXiv 2412.19437, 3.3) products run in e4m3, gradients too, while embedding, head, router, norms and attention
stay as they are, and so do parameters and optimizer: checkpoints do not change. V3 scales tiles of 1 x 128 activations
and blocks of 128 x 128 weights. Here every row has its scale, a power of two: torchao's finest stable recipe. The
gradients of the experts' weights stay in bfloat16, since an FP8 sum over the tokens of an expert wants their number
padded.

Legend: N rows (tokens times experts each), E experts, I and O inputs and outputs of a product.
"""

import dataclasses
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import _grouped_linear

from .conversion import FP8, FP8_MAX, FP8_WEIGHT
from .moe import DeepseekExperts, run_experts

if TYPE_CHECKING:
    from accelerate.utils import AORecipeKwargs
    from torchao.float8 import Float8LinearConfig

# The hardware's FP8 products want both sizes of a weight to be multiples of this; only test models' are not.
ALIGNMENT = 16


def check_hardware(least: tuple[int, int] = (8, 9), what: str = "") -> None:
    """Raises `ValueError` where there is no GPU of the compute capability that multiplies FP8."""
    found = "no CUDA device"
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability >= least:
            return
        found = f"{torch.cuda.get_device_name()} with {capability[0]}.{capability[1]}"
    raise ValueError(
        f"FP8 training{what} needs a GPU of compute capability {least[0]}.{least[1]} or more, found {found}; train in "
        'bfloat16 (`bf16=True`, `mixed_precision="bf16"`), or pass `emulate=True` to see, slowly, what FP8 does to the '
        "loss"
    )


# Linear layers


def module_filter(module: nn.Module, name: str) -> bool:
    """Whether the layer of that name trains in FP8: those whose weights the released checkpoints hold in FP8, which
    are all projections of attention, dense and shared MLPs, and not `eh_proj` or the head. (The router is no
    `nn.Linear`.)"""
    if not isinstance(module, nn.Linear) or not FP8_WEIGHT.search(f"{name}.weight"):
        return False
    return module.in_features % ALIGNMENT == 0 and module.out_features % ALIGNMENT == 0


def linear_config(*, emulate: bool = False) -> "Float8LinearConfig":
    """torchao's configuration of the layers.

    Args:
        emulate: round to FP8, but multiply in float32, on any device.

    Raises:
        ValueError: without `emulate`, on hardware without FP8.
    """
    if not emulate:
        check_hardware()
    from torchao.float8 import Float8LinearConfig

    config = Float8LinearConfig.from_recipe_name("rowwise")
    # The gradient of a weight sums over tokens, whose number is seldom a multiple of 16.
    return dataclasses.replace(config, emulate=emulate, pad_inner_dim=True)


def accelerate_recipe(*, emulate: bool = False) -> "AORecipeKwargs":
    """For `Accelerator(mixed_precision="fp8", kwargs_handlers=[...])`; accelerate does not know experts, see
    `convert_experts`. Arguments and errors as of `linear_config`."""
    config = linear_config(emulate=emulate)
    from accelerate.utils import AORecipeKwargs

    return AORecipeKwargs(config=config, module_filter_func=module_filter)


def convert_to_fp8_training(model: nn.Module, *, emulate: bool = False) -> nn.Module:
    """Puts torchao's layers in place of those of `module_filter`, on the same parameters, and converts the experts.

    Raises:
        ValueError: without `emulate`, on hardware without FP8 products of one matrix (8.9) and, where there are routed
            experts, of groups of them (9.0).
    """
    convert_experts(model, emulate=emulate)
    config = linear_config(emulate=emulate)
    from torchao.float8 import convert_to_float8_training

    return convert_to_float8_training(model, module_filter_fn=module_filter, config=config)


# Routed experts


class DeepseekFP8Experts(DeepseekExperts):
    """The experts on the same two parameters, with the products of `GroupedFP8`."""

    emulate = False

    def forward(self, hidden_TD: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return run_experts(self.project, self.act_fn, self.num_experts, hidden_TD, top_k_index, top_k_weights)

    def project(self, name: str, rows_ND: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = GroupedFP8.apply(rows_ND, getattr(self, name), offsets_E, self.emulate)
        return product


def convert_experts(model: nn.Module, *, emulate: bool = False) -> None:
    """Turns the routed experts of `model` into `DeepseekFP8Experts`, in place. Experts that are more than their two
    weights (quantised, adapted) stay as they are.

    Raises:
        ValueError: without `emulate`, where there are experts and no GPU of compute capability 9.0.
    """
    for module in model.modules():
        if type(module) is DeepseekExperts and not any(size % ALIGNMENT for size in module.down_proj.shape[1:]):
            if not emulate:
                check_hardware((9, 0), " of routed experts")
            module.__class__ = DeepseekFP8Experts
            cast(DeepseekFP8Experts, module).emulate = emulate


class GroupedFP8(torch.autograd.Function):
    """Rows (N, I) times their experts' matrices (E, O, I), as `run_experts` asks for: product and gradient of the rows
    in e4m3 with a scale for each row of either side, gradient of the matrices in the precision of the rows."""

    @staticmethod
    def forward(ctx, rows_NI, weight_EOI, offsets_E, emulate):
        ctx.save_for_backward(rows_NI, weight_EOI, offsets_E)
        ctx.emulate = emulate
        return grouped_product(to_fp8(rows_NI, 1), to_fp8(weight_EOI, 2), offsets_E, rows_NI.dtype, emulate)

    @staticmethod
    def backward(ctx, grad_NO):
        rows_NI, weight_EOI, offsets_E = ctx.saved_tensors
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            # Scales along what is now summed over: a weight of its own for this product.
            values_EIO, scales_EI1 = (part.transpose(1, 2) for part in to_fp8(weight_EOI, 1))
            weight = values_EIO.contiguous(), scales_EI1
            grad_rows = grouped_product(to_fp8(grad_NO, 1), weight, offsets_E, rows_NI.dtype, ctx.emulate)
        if ctx.needs_input_grad[1]:
            dtype = rows_NI.dtype if ctx.emulate else torch.bfloat16
            grad_weight = F.grouped_mm(grad_NO.to(dtype).t(), rows_NI.to(dtype), offs=offsets_E).to(weight_EOI.dtype)
        return grad_rows, grad_weight, None, None


def to_fp8(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values and float32 scales (size 1 along `dim`) with x = values * scales but for rounding. The scale is the
    smallest power of two that keeps the largest magnitude along `dim` within e4m3's 448."""
    largest = x.abs().amax(dim, keepdim=True).double().clamp(min=1e-12)
    inverse = torch.exp2(torch.floor(torch.log2(FP8_MAX / largest))).float()
    return (x.float() * inverse).clamp(-FP8_MAX, FP8_MAX).to(FP8), inverse.reciprocal()


def grouped_product(
    rows: tuple[torch.Tensor, torch.Tensor],
    weight: tuple[torch.Tensor, torch.Tensor],
    offsets_E: torch.Tensor,
    dtype: torch.dtype,
    emulate: bool,
) -> torch.Tensor:
    """Rows (N, I) of scales (N, 1) times matrices (E, O, I) of scales (E, O, 1): (N, O) in `dtype`."""
    (rows_NI, scales_N1), (weight_EOI, scales_EO1) = rows, weight
    if emulate:
        return _grouped_linear(rows_NI.float() * scales_N1, weight_EOI.float() * scales_EO1, offsets_E).to(dtype)
    by_row = F.ScalingType.RowWise
    product_NO = F.scaled_grouped_mm(  # type: ignore[attr-defined]  # not in torch's stubs
        rows_NI,
        weight_EOI.transpose(1, 2),
        scales_N1.squeeze(1),
        by_row,
        scales_EO1.squeeze(2),
        by_row,
        offs=offsets_E,
        output_dtype=torch.bfloat16,
    )
    return product_NO.to(dtype)
