"""The command line: what is printed, what is refused, what it costs to start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_deepseek.counts import load_config, weight_bytes
from modeling_deepseek.estimate import main
from modeling_deepseek.inference_cost import estimate_serving, what_fits
from modeling_deepseek.training_cost import estimate_training

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_config("deepseek-v3-lite"), "unknown model 'deepseek-v3-lite', did you mean 'deepseek-v2-lite'"),
        (lambda: estimate_serving("tiny-v3", gpu="h10"), "unknown GPU 'h10', did you mean 'h100'"),
        (lambda: estimate_serving("tiny-v3", context_tokens=513), "513 is beyond the model's `max_position_embed"),
        (lambda: estimate_serving("tiny-v3", context_tokens=16, gpus=0), "`gpus` must be at least 1, got 0"),
        (
            lambda: estimate_serving("tiny-v3", context_tokens=16, split="rows"),
            "unknown split 'rows'; one of layers, tensor",
        ),
        (
            lambda: estimate_serving("tiny-v3", context_tokens=16, gpus=3, split="tensor"),
            r"`gpus` \(3\) must divide the 4",
        ),
        (lambda: estimate_serving("tiny-v3", context_tokens=16, dollars_per_gpu_hour=-1), "must be a positive number"),
        (lambda: estimate_serving("tiny-v3", context_tokens=16, weights_dtype="int5"), "unknown weight dtype 'int5'"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, precision="fp64"), "unknown precision 'fp64'"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, optimizer="adam"), "did you mean 'adamw'"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, tokens=1e9), "`tokens` need `mfu` or a measured"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, tokens_per_second=0.0), "got 0.0"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, tokens=float("nan"), mfu=0.3), "got nan"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, dollars_per_gpu_hour=2), "needs the `tokens` of the"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, base_dtype="nf4"), "pass `lora_rank` too"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, lora_rank=8, precision="bf16"), "of full training"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, lora_rank=8, lora_sets=["mtp"], mtp=False), "leaves"),
        (lambda: estimate_training("tiny-v2", context_tokens=16, lora_rank=8, lora_sets=["mtp"]), "nothing of the set"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, mfu=39), r"`mfu` must lie in \(0, 1\], got 39"),
        (
            lambda: estimate_training("tiny-v3", context_tokens=16, mfu=0.3, tokens_per_second=5.0),
            "both say how fast it is",
        ),
    ],
)
def test_what_cannot_be_estimated_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def printed(capsys, *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_count_is_printed_and_says_the_same_as_json(capsys):
    text = printed(capsys, "count", "deepseek-v3")
    assert "671.03B" in text
    assert "36.63B" in text
    assert "70,272" in text
    numbers = json.loads(printed(capsys, "count", "deepseek-v3", "--json"))
    assert numbers["main"] == 671_026_404_352
    assert numbers["cache_bytes_per_token"]["bf16"] == 70272
    assert f"{numbers['training_flops_per_token'] / 1e9:.1f} GFLOPs" in text


def test_serving_is_printed_with_the_way_out(capsys):
    text = printed(capsys, "serve", "deepseek-v3", "--gpu", "H100", "--gpus", "8", "--context", "32K", "--dtype", "fp8")
    assert "does not fit; it would with --dtype nf4 or with --gpus 16" in text
    text = printed(
        capsys, "serve", "deepseek-v3", "--gpu", "h200", "--gpus", "8", "--context", "32K", "--dtype", "fp8",
        "--split", "tensor", "--dollars", "3",
    )  # fmt: skip
    assert "at least" in text
    assert "$" in text
    arguments = ("serve", "deepseek-v2-lite", "--gpu", "rtx-4090", "--dtype", "nf4", "--json")
    numbers = json.loads(printed(capsys, *arguments))
    assert numbers["fits"] is True
    assert numbers["bytes_per_gpu"] < numbers["gpu_memory_bytes"] == 24 * 10**9
    assert numbers["memory"]["weights_bytes"] == weight_bytes(load_config("deepseek-v2-lite"), "nf4")


def test_training_is_printed(capsys):
    arguments = ("train", "deepseek-v3", "--gpu", "h800", "--gpus", "2048", "--tokens", "14.8T", "--mfu", "0.3894")
    text = printed(capsys, *arguments, "--no-mtp", "--precision", "fp8", "--dollars", "2")
    assert "2,672,546" in text
    assert "$5,345,092" in text
    numbers = json.loads(printed(capsys, *arguments, "--no-mtp", "--json"))
    assert numbers["gpu_hours"] == pytest.approx(2_672_546, abs=1)
    assert numbers["tokens"] == 14.8e12


def test_the_table_is_aligned(capsys):
    lines = printed(capsys, "fits", "deepseek-v2-lite", "--dtypes", "bf16", "nf4").splitlines()
    rows = lines[-3:]
    assert rows[0].split()[:4] == ["model", "limit", "weights", "GB"]
    assert len({len(row) for row in rows}) == 1
    assert all(len(line) <= 120 for line in lines)
    assert rows[1].split()[4:] == ["-", "-", "-", *rows[1].split()[7:]]
    cells = json.loads(printed(capsys, "fits", "tiny-v3", "--dtypes", "bf16", "--json"))
    assert {cell["context_tokens"] for cell in cells} == {512}
    sequences = printed(capsys, "fits", "deepseek-v2-lite", "--dtypes", "nf4", "--context", "32K").splitlines()[-1]
    fits = what_fits(["deepseek-v2-lite"], ["nf4"], context_tokens=32768)
    assert sequences.split()[4:] == [f"{fit.batch_size}" if fit.batch_size else "-" for fit in fits]


def test_mistakes_are_said_in_a_line(capsys):
    assert main(["count", "deepseek-v4"]) == 1
    assert capsys.readouterr().err.startswith("error: unknown model 'deepseek-v4', did you mean 'deepseek-v")
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "deepseek-v3", "--gpu", "h10"])
    assert exit_.value.code == 2
    assert "unknown GPU 'h10', did you mean 'h100'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "deepseek-v3", "--context", "many"])
    assert "'many' is not a number of tokens: write 4096 or 32K" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "deepseek-v3", "--tokens", "inf"])
    assert "'inf' is not a count: write 4096, 500K, 20B or 14.8T" in capsys.readouterr().err


def test_thousands_are_1024_of_a_context_only(capsys):
    """500K tokens in an hour are 500,000; a context of 32K is 32,768."""
    arguments = ("--tokens", "500K", "--tokens-per-second", "1000", "--context", "32K")
    numbers = json.loads(printed(capsys, "train", "deepseek-v2-lite", *arguments, "--json"))
    assert numbers["hours"] == pytest.approx(500 / 3600)
    assert numbers["context_tokens"] == 32768


def test_small_models_have_their_own_context_and_units(capsys):
    numbers = json.loads(printed(capsys, "count", "tiny-v3", "--json"))
    assert numbers["context_tokens"] == 512
    text = printed(capsys, "count", "tiny-v3") + printed(capsys, "train", "tiny-v3", "--mfu", "0.3")
    assert "MFLOPs" in text
    assert " 0.0 " not in text


def test_fp8_is_said_to_be_for_serving_engines(capsys):
    assert "serving engines" in printed(capsys, "serve", "deepseek-v2-lite", "--gpu", "rtx-4090")
    assert "serving engines" not in printed(capsys, "serve", "deepseek-v2-lite", "--gpu", "h100")


def test_nothing_heavy_is_imported_before_a_model_is_named():
    program = (
        "import sys, modeling_deepseek\n"
        "from modeling_deepseek import estimate_serving, estimate_training, what_fits\n"
        "from modeling_deepseek.estimate import main\n"
        "main(['gpus'])\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert process.stdout.splitlines()[-1] == "[]"
    assert process.stdout.startswith("GPU ")
