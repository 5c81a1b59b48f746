"""Numbers before you buy: memory, hours and dollars of training and serving a configuration on given hardware.

    python -m modeling_deepseek.estimate count deepseek-v3
    python -m modeling_deepseek.estimate serve deepseek-v3 --gpu h200 --gpus 8 --dtype fp8 --context 32768
    python -m modeling_deepseek.estimate train moonlight-16b-a3b --gpu h100 --gpus 8 --tokens 2B --mfu 0.3
    python -m modeling_deepseek.estimate fits

The command line alone: `counts`, `inference_cost` and `training_cost` compute what is printed here, and `hardware` has
the cards. Importing it costs milliseconds; a model's name costs the import of transformers, and with it torch, which
the configuration classes need.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .activation_memory import LORA_SETS
from .counts import (
    CACHE_DTYPES,
    PARTS,
    WEIGHT_DTYPES,
    at_least_one,
    cache_bytes_per_token,
    count_parameters,
    forward_flops,
    load_config,
    training_flops,
    weight_bytes,
    within_context,
)
from .hardware import FRAGMENTATION, GPUS, PROCESS_BYTES, find_gpu
from .inference_cost import (
    FITS_DTYPES,
    FITS_MEMORY,
    FITS_MODELS,
    PREFILL_TOKENS,
    estimate_serving,
    serving_memory,
    what_fits,
)
from .training_cost import OPTIMIZERS, PRECISIONS, estimate_training

if TYPE_CHECKING:
    from .configuration_deepseek import DeepseekConfig


DEFAULT_CONTEXT = 4096
FP8_NOTE = "fp8 is what serving engines hold; this package loads FP8 checkpoints as bf16, int8 or nf4"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m modeling_deepseek.estimate`; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of a pipe (`| head`) had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_deepseek.estimate",
        description="Memory, hours and dollars of training and serving a DeepSeek model on given hardware.",
        epilog="COMMAND --help lists the options. Exit status 1 is an error; that something does not fit is none.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    json_option = argparse.ArgumentParser(add_help=False)
    json_option.add_argument("--json", action="store_true", help="the numbers as JSON, in the units of their names")
    context = f"4096, 32K, ... (default: {DEFAULT_CONTEXT}, or the model's limit where that is less)"
    model = argparse.ArgumentParser(add_help=False, parents=[json_option])
    model.add_argument("model", help="a preset (deepseek-v3, ...), or a folder or Hub id with a config.json")
    hardware = argparse.ArgumentParser(add_help=False)
    hardware.add_argument("--gpu", default="h100", metavar="NAME", type=_gpu_name, help=f"one of {', '.join(GPUS)}")
    hardware.add_argument("--gpus", type=int, default=1, metavar="N")
    hardware.add_argument("--dollars", type=float, metavar="PRICE", help="of one GPU for one hour")
    hardware.add_argument("--context", type=_context, metavar="TOKENS", help=context)
    hardware.add_argument("--batch", type=int, default=1, metavar="SEQUENCES", help="at once (training: on each GPU)")

    count = commands.add_parser("count", parents=[model], help="parameters, FLOPs, bytes: what is exact")
    count.add_argument("--context", type=_context, metavar="TOKENS", help=context)
    count.set_defaults(command=_print_count)

    serve = commands.add_parser("serve", parents=[model, hardware], help="memory and bounds of speed of serving")
    serve.add_argument("--dtype", choices=WEIGHT_DTYPES, default="bf16", help="of the weights")
    serve.add_argument("--cache-dtype", choices=CACHE_DTYPES, default="bf16")
    serve.add_argument("--split", choices=("layers", "tensor"), default="layers", help="of the model over the GPUs")
    serve.add_argument("--mtp", action="store_true", help="with the MTP modules, to draft")
    at_once = f"tokens of prompts that pass at once (default: {PREFILL_TOKENS})"
    serve.add_argument("--prefill-tokens", type=_context, default=PREFILL_TOKENS, metavar="N", help=at_once)
    serve.set_defaults(command=_print_serve)

    train = commands.add_parser("train", parents=[model, hardware], help="memory of a step, hours and dollars of a run")
    train.add_argument("--tokens", type=_count, help="of the run: 14.8T, 20B, ...")
    speed = train.add_mutually_exclusive_group()
    speed.add_argument("--mfu", type=float, help="share of the dense bfloat16 peak, 0 to 1")
    speed.add_argument("--tokens-per-second", type=_count, help="measured, all GPUs together")
    train.add_argument("--precision", choices=PRECISIONS, help="of full training (default: mixed)")
    train.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    train.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    train.add_argument("--logits-mib", type=int, metavar="MIB", help="of logits at a time (default: the model's, 512)")
    train.add_argument("--accumulates", action="store_true", help="gradients of several passes are summed")
    train.add_argument("--not-sharded", action="store_true", help="each GPU holds all (DDP)")
    train.add_argument("--no-mtp", action="store_true", help="without the MTP modules")
    train.add_argument("--lora-rank", type=int, metavar="R", help="adapters over frozen weights")
    train.add_argument("--lora-sets", nargs="+", choices=LORA_SETS, help="where (default: attention)")
    train.add_argument("--base-dtype", choices=WEIGHT_DTYPES, help="of the frozen weights (default: bf16)")
    train.set_defaults(command=_print_train)

    fits = commands.add_parser("fits", parents=[json_option], help="table: what fits into which memory")
    fits.add_argument("models", nargs="*", default=list(FITS_MODELS), metavar="MODEL")
    fits.add_argument("--dtypes", nargs="+", choices=WEIGHT_DTYPES, default=list(FITS_DTYPES))
    question = fits.add_mutually_exclusive_group()
    question.add_argument("--batch", type=int, default=1, metavar="SEQUENCES", help="the longest context of so many")
    question.add_argument("--context", type=_context, metavar="TOKENS", help="the most sequences of this context")
    fits.add_argument("--cache-dtype", choices=CACHE_DTYPES, default="bf16")
    fits.add_argument("--prefill-tokens", type=_context, default=PREFILL_TOKENS, metavar="N", help=at_once)
    fits.set_defaults(command=_print_fits)

    gpus = commands.add_parser("gpus", parents=[json_option], help="the cards that are known, and by which source")
    gpus.set_defaults(command=_print_gpus)
    return parser


def _gpu_name(name: str) -> str:
    try:
        find_gpu(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name.lower()


def _context(text: str) -> int:
    """K is 1,024, as contexts are written.

    >>> _context("32K"), _context("4096")
    (32768, 4096)
    """
    return _scaled(text, {"K": 1024, "M": 1024**2}, "a number of tokens: write 4096 or 32K")


def _count(text: str) -> int:
    """K is 1,000.

    >>> _count("500K"), _count("14.8T")
    (500000, 14800000000000)
    """
    return _scaled(text, {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}, "a count: write 4096, 500K, 20B or 14.8T")


def _scaled(text: str, scales: dict[str, int], what: str) -> int:
    scale = scales.get(text[-1:].upper())
    try:
        return round(float(text[:-1] if scale else text) * (scale or 1))
    except (ValueError, OverflowError):  # "many", and "inf"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None


def _model(arguments: argparse.Namespace) -> "DeepseekConfig":
    """The configuration; settles the context that was not given."""
    config = load_config(arguments.model)
    if arguments.context is None:
        arguments.context = min(DEFAULT_CONTEXT, config.max_position_embeddings)
    return config


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """The first column to the left, the others to the right; a row of one cell is a heading."""
    widths = [max(len(row[column]) for row in rows if len(row) > column) for column in range(max(map(len, rows)))]
    widths[0] = max(len(row[0]) for row in rows if len(row) > 1)
    for row in rows:
        cells = [row[0].ljust(widths[0]) if len(row) > 1 else row[0]]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        print("  ".join(cells).rstrip())


def _size(size: float) -> str:
    """In the unit that leaves the fewest digits.

    >>> _size(671.03e9), _size(24.2e6), _size(0)
    ('671.0 GB', '24.2 MB', '0 bytes')
    """
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= 0.05 * unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:,.0f} bytes"


def _billions(number: float) -> str:
    return f"{number / 1e9:,.2f}B" if number >= 1e7 else f"{number:,.0f}"


def _flops(flops: float) -> str:
    return f"{flops / 1e9:,.1f} GFLOPs" if flops >= 0.05e9 else f"{flops / 1e6:,.2f} MFLOPs"


def _print_count(arguments: argparse.Namespace) -> None:
    config = _model(arguments)
    at_least_one(context_tokens=arguments.context)
    within_context(config, arguments.context)
    count, context = count_parameters(config), arguments.context
    flops = {
        "training_flops_per_token": training_flops(config, context),
        "training_flops_per_token_without_mtp": training_flops(config, context, mtp=False),
        "prefill_flops_per_token": forward_flops(config, context, context, "expanded") / context,
        "decode_absorbed_flops_per_token": forward_flops(config, 1, context, "absorbed"),
        "decode_expanded_flops_per_token": forward_flops(config, 1, context, "expanded"),
    }
    cache = {dtype: cache_bytes_per_token(config, dtype) for dtype in CACHE_DTYPES}
    sizes = {dtype: weight_bytes(config, dtype) for dtype in WEIGHT_DTYPES}
    if arguments.json:
        totals = {"main": count.main, "total": count.total}
        bytes_of = {"cache_bytes_per_token": cache, "weights_bytes": sizes}
        _print_json({**dataclasses.asdict(count), **totals, "context_tokens": context, **flops, **bytes_of})
        return
    rows: list[tuple[str, ...]] = [("parameters", _billions(count.main))]
    rows += [(f"  {part.replace('_', ' ')}", _billions(getattr(count, part))) for part in PARTS if part != "mtp"]
    rows += [("  active per token (with the head, without the embedding)", _billions(count.active))]
    if count.mtp:
        rows += [("MTP modules, besides", _billions(count.mtp)), ("  active per token", _billions(count.active_mtp))]
    rows += [("",), (f"FLOPs per token, at a context of {context:,}",)]
    mtp = f" (without MTP {_flops(flops['training_flops_per_token_without_mtp'])})" if count.mtp else ""
    rows += [(f"  training, forward and backward{mtp}", _flops(flops["training_flops_per_token"]))]
    rows += [("  prefill, mean of the prompt", _flops(flops["prefill_flops_per_token"]))]
    rows += [("  decode, absorbed", _flops(flops["decode_absorbed_flops_per_token"]))]
    rows += [("  decode, expanded", _flops(flops["decode_expanded_flops_per_token"]))]
    rows += [("",), ("cache, bytes per token",)] + [(f"  {dtype}", f"{size:,}") for dtype, size in cache.items()]
    rows += [("",), ("weights" + " with MTP" * bool(count.mtp),)]
    rows += [(f"  {dtype}", _size(size)) for dtype, size in sizes.items()]
    _print_rows(rows)


def _print_serve(arguments: argparse.Namespace) -> None:
    config = _model(arguments)
    held: dict[str, Any] = {
        "context_tokens": arguments.context, "batch_size": arguments.batch, "weights_dtype": arguments.dtype,
        "cache_dtype": arguments.cache_dtype, "gpus": arguments.gpus, "split": arguments.split, "mtp": arguments.mtp,
        "prefill_tokens": arguments.prefill_tokens,
    }  # fmt: skip
    options = {"gpu": arguments.gpu, **held, "dollars_per_gpu_hour": arguments.dollars}
    estimate = estimate_serving(config, **options)
    if arguments.json:
        fullest = {"bytes_per_gpu": estimate.memory.bytes_per_gpu}
        _print_json({"model": arguments.model, **options, **dataclasses.asdict(estimate), **fullest})
        return
    several = arguments.gpus > 1
    where = f"{arguments.gpus} x {arguments.gpu}, split by {arguments.split}" if several else arguments.gpu
    columns = ("all", "fullest GPU") if several else ("",)

    def memory(text: str, together: int, fullest: int | None = None) -> tuple[str, ...]:
        return (text, _size(together), _size(together if fullest is None else fullest))[: 1 + len(columns)]

    def per_gpu(text: str, size: int) -> tuple[str, ...]:
        return (text, "", _size(size)) if several else (text, _size(size))

    rows: list[tuple[str, ...]] = [
        (f"{arguments.model} on {where}: {arguments.batch} x {arguments.context:,} tokens",),
        ("memory", *columns),
        memory(f"  weights, {arguments.dtype}", estimate.memory.weights_bytes, estimate.memory.weights_bytes_per_gpu),
        memory(f"  cache, {arguments.cache_dtype}", estimate.memory.cache_bytes, estimate.memory.cache_bytes_per_gpu),
        per_gpu(f"  workspace, prompts in pieces of {arguments.prefill_tokens:,}", estimate.memory.workspace_bytes),
        per_gpu("  allowance for process and allocator (our choice)", estimate.memory.allowance_bytes),
        per_gpu("  sum", estimate.memory.bytes_per_gpu),
        per_gpu("  of", estimate.gpu_memory_bytes),
    ]
    way_out = "" if estimate.fits else _way_out(config, estimate.gpu_memory_bytes, held)
    if not estimate.fits:
        rows.append((f"does not fit{way_out}",))
    if arguments.dtype == "fp8" or "fp8" in way_out:
        rows.append((FP8_NOTE,))
    rows.append((f"longest context that fits: {estimate.longest_context_tokens:,} tokens",))
    _print_rows(rows)
    if not estimate.fits:
        return
    rates = [("prefill", estimate.prefill_tokens_per_second, estimate.dollars_per_million_prefill_tokens)]
    rates += [("decode", estimate.decode_tokens_per_second, estimate.dollars_per_million_decode_tokens)]
    speed: list[tuple[str, ...]] = [("by the datasheet", "tokens/s, at most", "per million tokens, at least")]
    for name, rate, dollars in rates:
        speed.append((f"  {name}", f"{rate:,.0f}", "-" if dollars is None else f"${dollars:,.3f}"))
    print()
    _print_rows(speed)


def _way_out(config: "DeepseekConfig", memory_bytes: int, held: dict[str, Any]) -> str:
    """What would make it fit: fewer bytes for each weight, or more GPUs. `held` is asked of `serving_memory`."""

    def fits(**changed: Any) -> bool:
        return serving_memory(config, **{**held, **changed}).bytes_per_gpu <= memory_bytes

    ways = [f"--dtype {dtype}" for dtype in ("fp8", "int8", "nf4", "nf4-dq") if fits(weights_dtype=dtype)][:1]
    whole_heads = [2**n for n in range(1, 8) if held["split"] == "layers" or config.num_attention_heads % 2**n == 0]
    more = [gpus for gpus in whole_heads if gpus > held["gpus"] and fits(gpus=gpus)]
    ways += [f"--gpus {count}" for count in more[:1]]
    return f"; it would with {' or with '.join(ways)}" if ways else ""


def _print_train(arguments: argparse.Namespace) -> None:
    config = _model(arguments)
    options: dict[str, Any] = {
        "gpu": arguments.gpu, "gpus": arguments.gpus, "context_tokens": arguments.context,
        "batch_size": arguments.batch, "precision": arguments.precision, "optimizer": arguments.optimizer,
        "checkpointing": not arguments.no_checkpointing, "logits_workspace_mib": arguments.logits_mib,
        "accumulates": arguments.accumulates, "sharded": not arguments.not_sharded, "mtp": not arguments.no_mtp,
        "lora_rank": arguments.lora_rank, "lora_sets": arguments.lora_sets, "base_dtype": arguments.base_dtype,
        "tokens": arguments.tokens, "mfu": arguments.mfu, "tokens_per_second": arguments.tokens_per_second,
        "dollars_per_gpu_hour": arguments.dollars,
    }  # fmt: skip
    estimate = estimate_training(config, **options)
    if arguments.json:
        _print_json({"model": arguments.model, **options, **dataclasses.asdict(estimate)})
        return
    where = f"{arguments.gpus} x {arguments.gpu}" if arguments.gpus > 1 else arguments.gpu
    kind = f"adapters of rank {arguments.lora_rank} over {arguments.base_dtype or 'bf16'}"
    kind = kind if arguments.lora_rank else f"full, {arguments.precision or 'mixed'}"
    rows: list[tuple[str, ...]] = [
        (f"{arguments.model} on {where}: {kind}, {arguments.batch} x {arguments.context:,} tokens on each GPU",),
        (f"trains {_billions(estimate.memory.trainable_parameters)} of {_billions(estimate.parameters)} parameters",),
        ("memory on each GPU",),
        ("  weights", _size(estimate.memory.weights_bytes)),
        ("  gradients", _size(estimate.memory.gradients_bytes)),
        (f"  optimizer, {arguments.optimizer}", _size(estimate.memory.optimizer_bytes)),
        ("  activations that wait for the backward pass", _size(estimate.memory.activations_bytes)),
        ("  a layer computed again", _size(estimate.memory.recomputed_bytes)),
        ("  logits of the loss", _size(estimate.memory.logits_bytes)),
        ("  whole for a time: layers, buckets, dequantised weights", _size(estimate.memory.gathered_bytes)),
        ("  allowance for process and allocator (our choice)", _size(estimate.memory.allowance_bytes)),
        ("  peak (not all of these at once)", _size(estimate.memory.peak_bytes)),
        ("  of", _size(estimate.gpu_memory_bytes)),
    ]
    if not estimate.fits:
        rows.append(("does not fit",))
    if estimate.tokens_per_second is not None and estimate.mfu is not None:
        rows += [("time",), ("  FLOPs per token", _flops(estimate.flops_per_token))]
        rows += [("  tokens per second, all GPUs", f"{estimate.tokens_per_second:,.0f}")]
        rows += [("  MFU, of the dense bfloat16 peak", f"{estimate.mfu:.1%}")]
    if estimate.hours is not None and estimate.gpu_hours is not None:
        rows += [("  hours", f"{estimate.hours:,.1f}"), ("  GPU hours", f"{estimate.gpu_hours:,.0f}")]
    if estimate.dollars is not None:
        rows += [("  dollars", f"${estimate.dollars:,.0f}")]
    _print_rows([row for row in rows if len(row) == 1 or row[1] != "0 bytes"])


def _print_fits(arguments: argparse.Namespace) -> None:
    at_least_one(batch_size=arguments.batch, prefill_tokens=arguments.prefill_tokens)
    if arguments.context is not None:
        at_least_one(context_tokens=arguments.context)
    table = what_fits(
        arguments.models,
        arguments.dtypes,
        batch_size=arguments.batch,
        context_tokens=arguments.context,
        cache_dtype=arguments.cache_dtype,
        prefill_tokens=arguments.prefill_tokens,
    )
    if arguments.json:
        _print_json([dataclasses.asdict(fit) for fit in table])
        return
    if arguments.context is not None:
        print(f"Sequences of {arguments.context:,} tokens (at most the model's limit) that fit at a time")
    else:
        sequences = "one sequence" if arguments.batch == 1 else f"each of {arguments.batch} sequences"
        print(f"Longest context of {sequences} that fits, in tokens (K = 1,024)")
    print("(-: not even the weights). Cache " + arguments.cache_dtype + ", no MTP modules, prompts in pieces of")
    print(
        f"{arguments.prefill_tokens:,} tokens. Kept free on each card, our choice: {_size(PROCESS_BYTES)} and", end=" "
    )
    print(f"{FRAGMENTATION:.0%} of the tensors.")
    if "fp8" in arguments.dtypes:
        print(FP8_NOTE)
    memory = [f"{gpus}x{gigabytes} GB" if gpus > 1 else f"{gigabytes} GB" for gpus, gigabytes in FITS_MEMORY]
    rows: list[tuple[str, ...]] = [("model", "limit", "weights", "GB", *memory)]
    for start in range(0, len(table), len(FITS_MEMORY)):
        row = table[start : start + len(FITS_MEMORY)]
        limit = load_config(row[0].model).max_position_embeddings
        if arguments.context is None:
            cells = [_thousands(fit.context_tokens) for fit in row]
        else:
            cells = [f"{fit.batch_size:,}" if fit.batch_size else "-" for fit in row]
        size = f"{row[0].weights_bytes / 1e9:,.1f}"
        rows.append((row[0].model, _thousands(limit), row[0].weights_dtype, size, *cells))
    print()
    _print_rows(rows)


def _thousands(tokens: int) -> str:
    if tokens == 0:
        return "-"
    return f"{tokens // 1024}K" if tokens >= 1024 else f"{tokens}"


def _print_gpus(arguments: argparse.Namespace) -> None:
    if arguments.json:
        _print_json({name: dataclasses.asdict(gpu) for name, gpu in GPUS.items()})
        return
    rows: list[tuple[str, ...]] = [("GPU", "memory", "bandwidth", "bf16 TFLOP/s", "fp8 TFLOP/s", "source")]
    for name, gpu in GPUS.items():
        fp8 = "-" if gpu.fp8_flops_per_second is None else f"{gpu.fp8_flops_per_second / 1e12:,.0f}"
        bandwidth = f"{gpu.bandwidth_bytes_per_second / 1e9:,.0f} GB/s"
        bf16 = f"{gpu.bf16_flops_per_second / 1e12:,.0f}"
        rows.append((name, f"{gpu.memory_bytes / 1e9:,.0f} GB", bandwidth, bf16, fp8, gpu.source))
    _print_rows(rows)


if __name__ == "__main__":
    sys.exit(main())
