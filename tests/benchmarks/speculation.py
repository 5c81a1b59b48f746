"""Rows of the benchmark table: tokens a second with the bundled teacher drafting for itself, against its own plain
decoding on the absorbed path, on held-out questions of the kinds it knows. Greedy tokens must be the same; in bfloat16
a near tie may go either way, and the row says how many rows of how many are the same. And how tokens that are drawn
with drafts are distributed."""

from collections.abc import Iterator
from statistics import mean
from unittest import mock

import torch
from rows import DEVICE, REPOSITORY, Row
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.reasoning_gym_tasks import problems
from modeling_deepseek.drafting import Pace
from tests.modeling_deepseek import test_speculation

TEACHER = REPOSITORY / "recipes" / "tiny_teacher"
KINDS = ("spell_backward", "letter_counting", "chain_sum", "gcd", "leg_counting")
SEED = 5  # the teacher was trained on other seeds


def batches(tokenizer, size: int, count: int) -> list:
    questions = [list(problems(kind, count, SEED)) for kind in KINDS]
    texts = [kind[number]["question"] for number in range(count) for kind in questions]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [
        tokenizer.apply_chat_template(
            chats[start : start + size],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(DEVICE)
        for start in range(0, len(chats), size)
    ]


def speculation(alternate) -> Iterator[Row]:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER, padding_side="left")
    cases = [(1, False, torch.float32), (1, True, torch.float32), (4, False, torch.float32), (8, False, torch.float32)]
    if DEVICE == "cuda":
        cases += [(1, False, torch.bfloat16), (8, False, torch.bfloat16)]
    for size, do_sample, dtype in cases:
        model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=dtype).to(DEVICE).eval()
        inputs = batches(tokenizer, size, count=2 if size == 1 else size)

        def run(use_mtp: bool, model=model, inputs=inputs, do_sample=do_sample) -> list:
            torch.manual_seed(0)
            options = {"max_new_tokens": 200, "do_sample": do_sample, "return_dict_in_generate": True}
            return [model.generate(**batch, **options, use_mtp=use_mtp) for batch in inputs]

        def tokens(outputs: list, inputs=inputs) -> int:
            new = [o.sequences[:, i["input_ids"].shape[1] :] for o, i in zip(outputs, inputs, strict=True)]
            return sum(int((one != 0).sum()) for one in new)

        plain, drafted = run(False), run(True)
        same = [
            torch.equal(one, other)
            for a, b in zip(plain, drafted, strict=True)
            for one, other in zip(a.sequences, b.sequences, strict=True)
            if a.sequences.shape == b.sequences.shape
        ]
        if not do_sample and dtype == torch.float32:
            assert all(same)
            assert len(same) == sum(len(one.sequences) for one in plain)
        timing = alternate(lambda run=run: run(True), lambda run=run: run(False), runs=5, warmup=1)
        per_s, plain_s = tokens(drafted) / timing.ours, tokens(plain) / timing.theirs
        drafts, kept = (sum(int(getattr(o, name).sum()) for o in drafted) for name in ("drafted", "accepted"))
        first = mean(o.acceptance[0] for o in drafted)
        kind = "sampling" if do_sample else "greedy" if dtype == torch.float32 else f"greedy, {mean(same):.0%} same"
        name = f"speculation, batch {size}, {kind}, {str(dtype)[6:]}; kept: first {first:.0%}, all {kept / drafts:.0%}"
        ratio = timing.ratio * tokens(drafted) / tokens(plain)  # sampled texts differ in length
        goal = ">= 1.5x" if size == 1 and dtype == torch.float32 and DEVICE == "cpu" else ""
        if not do_sample and dtype == torch.float32:
            goal = f"{goal}, the same tokens".removeprefix(", ")
        yield Row(name, f"{per_s:,.0f} tok/s", f"{plain_s:,.0f} tok/s", f"{ratio:.2f}x", goal)


def sampled_distribution(alternate) -> Iterator[Row]:
    """Where the number of drafts is held at three, so that there is always something to reject."""
    with mock.patch.object(Pace, "choose", lambda self, rooms: min(3, max(rooms))):
        for seed, prompt in enumerate([(3, 1, 4, 1, 2), (2, 2)]):
            torch.manual_seed(seed)
            counts, output = test_speculation.sample(25_000, prompt)
            value = test_speculation.significance(counts, test_speculation.every_outcome(prompt))
            name = f"100,000 tokens drawn with drafts, first kept {output.acceptance[0]:.0%}, chi-squared to the exact"
            yield Row(name, f"p = {value:.2f}", "", "", "> 0.001")


ROWS = {"self-speculation": speculation, "speculative sampling": sampled_distribution}
