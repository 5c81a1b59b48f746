"""GPUs by their datasheets, and what a process takes on each beside its tensors. `inference_cost` and `training_cost`
put configurations on them.
"""

from dataclasses import dataclass

from .counts import one_of


@dataclass(frozen=True)
class Gpu:
    """One card. Peaks are dense (no 2:4 sparsity) with float32 accumulation, as training and serving use them."""

    memory_bytes: int  # the name's GB as 10^9 bytes: what drivers report is the same or a few percent more
    bandwidth_bytes_per_second: float
    bf16_flops_per_second: float
    fp8_flops_per_second: float | None  # None: no FP8 units, so FP8 weights are multiplied in bfloat16
    source: str


def _gpu(gigabytes: int, gigabytes_per_second: float, bf16_tflops: float, fp8_tflops: float | None, source: str) -> Gpu:
    fp8 = fp8_tflops * 1e12 if fp8_tflops else None
    return Gpu(gigabytes * 10**9, gigabytes_per_second * 1e9, bf16_tflops * 1e12, fp8, source)


# Datasheets print peaks with sparsity: half of those stands here.
GPUS = {
    "l4": _gpu(24, 300, 121, 242.5, "NVIDIA L4 datasheet"),
    "l40s": _gpu(48, 864, 362.05, 733, "NVIDIA L40S datasheet"),
    "rtx-3090": _gpu(24, 936, 71, None, "NVIDIA GA102 whitepaper, FP32 accumulate"),
    "rtx-4090": _gpu(24, 1008, 165.2, 330.3, "NVIDIA Ada whitepaper, FP32 accumulate"),
    "rtx-5090": _gpu(32, 1792, 209.5, 419, "NVIDIA RTX Blackwell whitepaper, FP32 accumulate"),
    "a100-40gb": _gpu(40, 1555, 312, None, "NVIDIA A100 datasheet, SXM"),
    "a100-80gb": _gpu(80, 2039, 312, None, "NVIDIA A100 datasheet, SXM"),
    "h100": _gpu(80, 3350, 989.4, 1978.9, "NVIDIA H100 datasheet, SXM"),
    "h800": _gpu(80, 3350, 989.4, 1978.9, "as H100 SXM; it differs in NVLink and FP64 (arXiv 2505.09343)"),
    "h200": _gpu(141, 4800, 989.4, 1978.9, "NVIDIA H200 datasheet, SXM"),
    "mi300x": _gpu(192, 5300, 1307.4, 2614.9, "AMD Instinct MI300X data sheet"),
}
# V3's own assumption (its table 1), and the only price here: rents change by the month.
V3_DOLLARS_PER_H800_HOUR = 2.0

# Allowances, our choice. The process on each GPU, before any tensor: context, kernels, workspaces of the libraries.
PROCESS_BYTES = 600 * 10**6
# What the allocator holds and cannot use, as a share of all tensors.
FRAGMENTATION = 0.03


def find_gpu(gpu: str | Gpu) -> Gpu:
    """One of `GPUS` by its name, or the `Gpu` itself.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    if isinstance(gpu, Gpu):
        return gpu
    one_of("GPU", gpu.lower(), GPUS)
    return GPUS[gpu.lower()]
