"""Rows of the benchmark table: routed experts in 4 and 8 bits. Bytes, memory to load, errors of the logits, and the
time of a layer's experts with V2-Lite's sizes, against unquantised ones and a loop over bitsandbytes' layers."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rows import DEVICE, REPOSITORY, SMALL, Row, timed
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM
from modeling_deepseek.moe import DeepseekExperts
from modeling_deepseek.quantization import DeepseekExperts4bit, DeepseekExperts8bit
from tests.modeling_deepseek.test_quantization import FORMATS, LoopOfLinears, logits, peak_and_final, relative

TEACHER = REPOSITORY / "recipes" / "tiny_teacher"
# One MoE layer of V2-Lite with a quarter of its experts.
V2_LITE = {**SMALL, "hidden_size": 2048, "moe_intermediate_size": 1408}


def quantized(plain: DeepseekExperts, settings: dict) -> DeepseekExperts4bit | DeepseekExperts8bit:
    """Quantised experts with the weights of plain ones, on their device."""
    config = BitsAndBytesConfig(**settings)
    kind = DeepseekExperts4bit if config.load_in_4bit else DeepseekExperts8bit
    experts = kind(plain, config)
    for name, halves in (("gate_up_proj", 2), ("down_proj", 1)):
        for expert, stack in enumerate(getattr(plain, name).detach()):
            for half, weight in enumerate(stack.chunk(halves)):
                experts.put(name, expert, half, *experts.quantize(weight))
    return experts.eval()


def experts_of_v2_lite(count: int) -> DeepseekExperts:
    torch.manual_seed(0)
    config = DeepseekV3Config(**{**V2_LITE, "n_routed_experts": count, "num_experts_per_tok": min(count, 6)})
    return DeepseekExperts(config).to(DEVICE, torch.bfloat16).eval()


def quantized_bytes(alternate) -> Iterator[Row]:
    plain = experts_of_v2_lite(1)
    whole = sum(parameter.nbytes for parameter in plain.parameters())
    for name, goal in (("nf4", "<= 0.30x"), ("double", "<= 0.30x"), ("int8", "")):
        held = sum(tensor.nbytes for tensor in quantized(plain, FORMATS[name]).state_dict().values())
        assert held <= 0.30 * whole or name == "int8"
        yield Row(f"bytes of an expert of V2-Lite, {name}", f"{held:,}", f"{whole:,}", f"{held / whole:.4f}x", goal)


def quantized_load_memory(alternate) -> Iterator[Row]:
    if not Path("/proc/self/status").exists():
        return
    fields = {**SMALL, "num_hidden_layers": 6, "n_routed_experts": 24, "moe_intermediate_size": 512}
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM._from_config(DeepseekV3Config(**fields), dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/bfloat16")
        model.save_pretrained(f"{folder}/FP8", fp8=True)
        for stored, bits in (("bfloat16", "nf4"), ("FP8", "nf4"), ("bfloat16", "int8"), ("FP8", "int8")):
            peak, final = peak_and_final(f"{folder}/{stored}", bits, mapped=stored == "bfloat16")
            name = f"peak memory to load in {bits} from {stored}, against the result"
            yield Row(name, f"{peak / 1e6:.0f} MB", f"{final / 1e6:.0f} MB", f"{peak / final:.2f}x", "<= 1.3x")


def quantized_errors(alternate) -> Iterator[Row]:
    plain = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    ids = torch.randint(3, plain.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    exact = logits(plain, ids)
    for name in ("nf4", "double", "fp4", "int8"):
        errors = []
        for make in (quantized, LoopOfLinears):
            model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
            for layer in model.model.layers[1 : model.config.num_hidden_layers]:
                layer.mlp.experts = make(layer.mlp.experts, FORMATS[name])
            errors.append(relative(logits(model, ids), exact))
        assert errors[0] <= errors[1] * 1.001
        row = f"error of the logits of the tiny teacher, experts in {name}"
        yield Row(row, f"{errors[0]:.5f}", f"{errors[1]:.5f}", f"{errors[0] / errors[1]:.3f}x", "no worse than linears")


def quantized_speed(alternate) -> Iterator[Row]:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    plain = experts_of_v2_lite(16)
    settings = {**FORMATS["nf4"], "bnb_4bit_compute_dtype": "bfloat16"}
    ours, int8 = quantized(plain, settings), quantized(plain, FORMATS["int8"])
    loop, rearranged = LoopOfLinears(plain, settings), LoopOfLinears(plain, settings)
    for layer in rearranged.layers.values():
        # What bitsandbytes does by itself on CPUs with AVX512-BF16; see `replace_experts` on what it costs.
        layer.eval().support_avx512bf16_for_cpu = DEVICE == "cpu"
    for tokens, runs in ((1, 9), (512, 3)):
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(tokens, 2048, generator=generator).to(DEVICE, torch.bfloat16)
        choices = torch.stack([torch.randperm(16, generator=generator)[:6] for _ in range(tokens)]).to(DEVICE)
        weights = torch.rand(tokens, 6, generator=generator).to(DEVICE, torch.bfloat16)

        def call(experts, rows=rows, choices=choices, weights=weights):
            with torch.no_grad():
                return experts(rows, choices, weights)

        expected = call(loop).float()
        others = {"a loop over Linear4bit": loop, "unquantised": plain}
        if DEVICE == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
            others["a loop over Linear4bit as rearranged for inference"] = rearranged
        assert relative(call(ours).float(), expected) < 0.01
        step = "decode step" if tokens == 1 else f"prefill of {tokens} tokens"
        for name, other in others.items():
            assert relative(call(other).float(), expected) < 0.2
            timing = alternate(lambda: call(ours), lambda other=other: call(other), runs=runs, warmup=1)
            yield timed(f"experts in NF4, {step}, against {name}", timing, "")
        timing = alternate(lambda: call(int8), lambda: call(plain), runs=runs, warmup=1)
        yield timed(f"experts in int8, {step}, against unquantised", timing, "")


ROWS = {
    "quantised bytes": quantized_bytes,
    "quantised load memory": quantized_load_memory,
    "quantised errors": quantized_errors,
    "quantised speed": quantized_speed,
}
