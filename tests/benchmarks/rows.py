"""The rows of the benchmark table. Each is a function of the timer that yields `Row`s, and checks that both sides gave
the same answer: a fast wrong answer is no row."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as Theirs
from transformers.utils import logging

from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM
from tests.modeling_deepseek.test_balance import train_on_skewed_text
from tests.modeling_deepseek.test_golden import GOLDEN, POSITIONS

logging.set_verbosity_error()
logging.disable_progress_bar()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPOSITORY = Path(__file__).parents[2]

# V3's head sizes and ranks; the rest is small, so that a laptop holds it and attention is what is measured.
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "max_position_embeddings": 65536,
}
ONE_LAYER_128_HEADS = {**SMALL, "num_hidden_layers": 1, "num_attention_heads": 128}
# About 80M parameters, 32 experts.
TRAINED = {
    **SMALL,
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "moe_intermediate_size": 384,
    "n_routed_experts": 32,
    "num_attention_heads": 8,
    "aux_loss_alpha": 0.0,  # transformers has no balance loss, and the two must do the same work
}


@dataclass(frozen=True)
class Row:
    name: str
    ours: str
    theirs: str = ""
    ratio: str = ""
    goal: str = ""


def both(fields: dict, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our model and transformers' on the same random weights, in eval mode."""
    torch.manual_seed(0)
    ours = DeepseekV3ForCausalLM._from_config(DeepseekV3Config(**fields), dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = Theirs.from_pretrained(folder, dtype=dtype)
    return ours.to(DEVICE).eval(), theirs.to(DEVICE).eval()


def check_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to 1e-4 in float32. In bfloat16 the two round differently at every step: the mean error is bounded."""
    if ours.dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    else:
        error = (ours.float() - theirs.float()).abs().mean() / theirs.float().abs().mean()
        assert error < 0.05, f"outputs differ by {error:.1%} on average"


def timed(name: str, timing, goal: str) -> Row:
    return Row(name, f"{timing.ours * 1e3:.1f} ms", f"{timing.theirs * 1e3:.1f} ms", f"{timing.ratio:.2f}x", goal)


def filled_cache(config: DeepseekV3Config, context: int, dtype: torch.dtype) -> DynamicCache:
    """A cache that holds `context` random latents in every layer."""
    generator = torch.Generator().manual_seed(1)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        latents = torch.randn(1, 1, context, config.kv_lora_rank + config.qk_rope_head_dim, generator=generator)
        parts = latents.to(DEVICE, dtype).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        cache.update(*parts, layer)
    return cache


def decode_step(model: torch.nn.Module, cache: DynamicCache):
    """A call that decodes one more token; the cache grows by one each time, alike on both sides."""
    token = torch.tensor([[5]], device=DEVICE)

    @torch.no_grad()
    def step() -> torch.Tensor:
        return model(token, past_key_values=cache, use_cache=True).logits

    return step


def official_logits(alternate) -> Iterator[Row]:
    for name in ("v3", "v2_lite"):
        for path in ("expanded", "absorbed"):
            model = AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32, mla_path=path)
            expected = load_file(GOLDEN / name / "expected.safetensors")
            with torch.no_grad():
                at_once = model(expected["input_ids"]).logits[:, POSITIONS]
            difference = (at_once - expected["logits"]).abs().max().item()
            yield Row(f"logits against the official code, {name}, {path}", f"{difference:.1e}", "", "", "<= 2e-5")


def balance(alternate) -> Iterator[Row]:
    (without, loss_without), (with_update, loss_with) = train_on_skewed_text(0.0), train_on_skewed_text(0.005)
    yield Row(
        f"MaxVio with the bias update (without: {without:.2f})",
        f"{with_update:.2f}",
        "",
        f"{with_update / without:.2f}x",
        f"< 0.25x, loss no worse: {loss_with:.3f} against {loss_without:.3f}",
    )


def decode(alternate) -> Iterator[Row]:
    cases = [
        (SMALL, 2048, torch.float32, ">= 4x"),
        (SMALL, 8192, torch.float32, ">= 15x"),
        (SMALL, 2048, torch.bfloat16, ">= 4x"),
        (SMALL, 8192, torch.bfloat16, ">= 15x"),
        (ONE_LAYER_128_HEADS, 2048, torch.float32, ">= 8x"),
        (ONE_LAYER_128_HEADS, 2048, torch.bfloat16, ">= 8x"),
    ]
    if DEVICE == "cuda":
        cases = [(SMALL, 8192, torch.bfloat16, ""), (SMALL, 32768, torch.bfloat16, "")]
        cases += [(ONE_LAYER_128_HEADS, 8192, torch.bfloat16, ""), (ONE_LAYER_128_HEADS, 32768, torch.bfloat16, "")]
    for fields, context, dtype, goal in cases:
        ours, theirs = both(fields, dtype)
        steps = [decode_step(model, filled_cache(ours.config, context, dtype)) for model in (ours, theirs)]
        check_close(steps[0](), steps[1]())
        heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
        name = f"decode, {heads} heads, {layers} layers, {context} context, {str(dtype)[6:]}"
        yield timed(name, alternate(*steps, runs=11), goal)


def prefill(alternate) -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16):
        models = both(SMALL, dtype)
        prompt = torch.randint(0, 1024, (1, 2048), generator=torch.Generator().manual_seed(2)).to(DEVICE)

        @torch.no_grad()
        def run(model, prompt=prompt):
            return model(prompt, logits_to_keep=1).logits

        check_close(*[run(model) for model in models])
        timing = alternate(lambda models=models: run(models[0]), lambda models=models: run(models[1]), runs=5, warmup=1)
        yield timed(f"prefill, 2048 tokens, {str(dtype)[6:]}", timing, "not slower; aim 1.2x")


def train(alternate) -> Iterator[Row]:
    models = both(TRAINED, torch.float32)
    size = sum(parameter.numel() for parameter in models[0].parameters()) / 1e6
    optimizers = [torch.optim.AdamW(model.train().parameters(), lr=1e-4) for model in models]

    def step(which: int, batch: torch.Tensor) -> float:
        loss = models[which](batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizers[which].step()
        optimizers[which].zero_grad()
        return loss.item()

    for shape in ((4, 512), (1, 2048)):
        batch = torch.randint(0, 8192, shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        losses = step(0, batch), step(1, batch)
        assert abs(losses[0] - losses[1]) < 1e-3, losses
        timing = alternate(lambda batch=batch: step(0, batch), lambda batch=batch: step(1, batch), runs=7, warmup=1)
        name = f"training step, {size:.0f}M, 32 experts, {shape[0]} x {shape[1]} tokens"
        yield timed(name, timing, "not slower; aim 1.2x")


def cache_bytes(alternate) -> Iterator[Row]:
    config = DeepseekV3Config(**SMALL)
    cache = filled_cache(config, 1000, torch.bfloat16)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    exact = config.num_hidden_layers * 1000 * (config.kv_lora_rank + config.qk_rope_head_dim) * 2
    assert held == exact, (held, exact)
    yield Row("cache, 1000 tokens, 4 layers, bfloat16", f"{held} B", "", "", f"exactly {exact} B")


class LargestTensor(TorchDispatchMode):
    """Remembers the most values that one new tensor of an operation had (views of old ones do not count)."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in known:
                self.values = max(self.values, value.numel())
        return result


def decode_allocations(alternate) -> Iterator[Row]:
    largest = {}
    for context in (1024, 8192):
        for side, model in zip(("ours", "theirs"), both(ONE_LAYER_128_HEADS, torch.float32), strict=True):
            step = decode_step(model, filled_cache(model.config, context, torch.float32))
            with LargestTensor() as mode:
                step()
            largest[side, context] = mode.values
    for context in (1024, 8192):
        yield Row(
            f"largest tensor of a decode step, 128 heads, {context} context",
            f"{largest['ours', context]:,}",
            f"{largest['theirs', context]:,}",
            f"{largest['theirs', context] / largest['ours', context]:.0f}x",
            f"far below tokens x heads x head size = {context * 128 * 256:,}",
        )


# Peak of anonymous memory, so that pages of the file that are merely mapped do not count. Torch and transformers are
# loaded before the measurement begins.
_LOAD = """
import sys, threading, torch
from transformers import AutoConfig
import modeling_deepseek, modeling_deepseek.modeling_deepseek
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as Theirs
from transformers.utils import logging
logging.disable_progress_bar()

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

model_class = modeling_deepseek.DeepseekV3ForCausalLM if sys.argv[2] == "ours" else Theirs
start = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
model = model_class.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
done.set()
watcher.join()
print(max(peak, anonymous()) - start, sum(p.nbytes for p in model.parameters()))
"""


def load_memory(alternate) -> Iterator[Row]:
    if not Path("/proc/self/status").exists():
        return
    fields = {**SMALL, "num_hidden_layers": 8, "n_routed_experts": 64, "moe_intermediate_size": 512}
    with tempfile.TemporaryDirectory() as folder:
        model = DeepseekV3ForCausalLM._from_config(DeepseekV3Config(**fields), dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="200MB")
        peaks = {}
        for side in ("ours", "theirs"):
            command = [sys.executable, "-c", _LOAD, folder, side]
            output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
            peaks[side], size = (int(value) for value in output.split())
    yield Row(
        f"peak memory to load {size / 2**20:.0f} MiB in bfloat16, sharded",
        f"{peaks['ours'] / size:.2f} model",
        f"{peaks['theirs'] / size:.2f} model",
        f"{peaks['theirs'] / peaks['ours']:.2f}x",
        "<= 1.2 model",
    )


def import_time(alternate) -> Iterator[Row]:
    program = (
        "import time, {before}\nstart = time.perf_counter()\nimport modeling_deepseek\n{after}\n"
        "print(time.perf_counter() - start)"
    )
    cases = {
        "import modeling_deepseek after transformers": ("transformers", ""),
        "its model classes, after transformers' model classes": (
            "transformers.models.deepseek_v3.modeling_deepseek_v3",
            "modeling_deepseek.DeepseekV3ForCausalLM",
        ),
    }
    for name, (before, after) in cases.items():
        seconds = []
        for _ in range(3):
            command = [sys.executable, "-c", program.format(before=before, after=after)]
            output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
            seconds.append(float(output.split()[-1]))
        yield Row(name, f"{sorted(seconds)[1]:.3f} s", "", "", "< 0.3 s")


ROWS = {
    "official logits": official_logits,
    "decode": decode,
    "prefill": prefill,
    "train": train,
    "cache bytes": cache_bytes,
    "decode allocations": decode_allocations,
    "load memory": load_memory,
    "import time": import_time,
    "balance": balance,
}
