"""Rows of the benchmark table: what the teacher's traces cost.

Adaptive rejection sampling against a fixed number of samples a problem: the tokens for the same accepted traces, and
the hard problems covered for the same tokens. Traces a second of a model in this process against `model.generate` on
padded batches of the same size, as pipelines do it that sample with transformers; what the client adds to a request.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rows import DEVICE, Row, timed

from distill.teacher import generate
from eval.local_sampler import TransformersSampler
from eval.store import Store
from tests.distill.teaching import Exact, StubTeacher, chance, problem, settings, sums
from tests.eval.models import tiny_lm, tiny_tokenizer

BATCH_SIZE = 32
BUDGET = 128


def adaptive(alternate) -> Iterator[Row]:
    problems = sums(400)
    accepted, tokens = {}, {}

    def run(name: str, **changes) -> None:
        with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "samples.sqlite") as store:
            found = generate(lambda: problems, StubTeacher(window=64), settings(**changes), 0, store, Exact())
            kept: dict[str, list[int]] = {}
            for one in store:
                if one.context["graded"]["verdict"] == "correct":
                    kept.setdefault(one.context["problem"], []).append(one.context["index"])
            accepted[name] = {name: sorted(indices)[:2] for name, indices in kept.items()}
            tokens[name] = found.completion_tokens

    run("adaptive", correct=2, most=16)
    run("fixed", correct=16, most=16)
    assert accepted["adaptive"] == accepted["fixed"]
    same = 2
    while tokens.get("same", 0) < tokens["adaptive"]:  # the least fixed number that takes as many tokens
        same += 1
        run("same", correct=same, most=same)
    yield Row(
        "tokens, 2 right of at most 16, adaptive and 16 each",
        f"{tokens['adaptive']:,}",
        f"{tokens['fixed']:,}",
        f"{1 - tokens['adaptive'] / tokens['fixed']:.0%} less",
        ">= 30 % less for the same traces",
    )
    hard = {one.id for one in problems if 0 < chance(one.question) < 0.3}
    covered = [len(hard & set(accepted[name])) for name in ("adaptive", "same")]
    yield Row(
        f"of {len(hard)} hard problems solved, against {same} samples each",
        f"{covered[0]}",
        f"{covered[1]}",
        f"{covered[0] / covered[1]:.2f}x",
        f"more, for fewer tokens ({tokens['adaptive'] / tokens['same']:.0%})",
    )


def client(alternate) -> Iterator[Row]:
    problems = sums(5000)
    sampler = StubTeacher(window=128)
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "samples.sqlite") as store:
        began, used = time.perf_counter(), time.process_time()
        found = generate(lambda: problems, sampler, settings(), 0, store, Exact())
        seconds, used = time.perf_counter() - began, time.process_time() - used
    yield Row(
        f"client of the teacher, {found.asked:,} samples",
        f"{used / found.asked * 1000:.2f} ms",
        f"({seconds / found.asked * 1000:.2f} wall)",
        "",
        "< 1 ms a request",
    )


def traces(alternate) -> Iterator[Row]:
    """Both sample the same prompts as often, with the same budget, from the same weights."""
    for family in ("deepseek", "llama"):
        model, tokenizer = tiny_lm(family, ends=4.0).to(DEVICE), tiny_tokenizer()
        tokenizer.padding_side = "left"
        problems = [problem(number, kind="none", answer="") for number in range(64)]
        sampler = TransformersSampler(model, tokenizer, batch_size=BATCH_SIZE, name="tiny")
        teacher = settings(correct=4, most=4, max_tokens=BUDGET)
        texts = [
            sampler.render([{"role": "user", "content": f"Work out {one.question}"}], open_thought=True)
            for one in problems
            for _ in range(4)
        ]
        written = {}

        def ours(sampler=sampler, teacher=teacher, problems=problems, written=written) -> None:
            with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "samples.sqlite") as store:
                found = generate(lambda: problems, sampler, teacher, 0, store, Exact())
            assert found.solved == len(problems)
            written["ours"] = found.completion_tokens

        def theirs(model=model, tokenizer=tokenizer, texts=texts, written=written) -> None:
            total = 0
            for first in range(0, len(texts), BATCH_SIZE):
                batch = tokenizer(
                    texts[first : first + BATCH_SIZE], return_tensors="pt", padding=True, add_special_tokens=False
                ).to(DEVICE)
                with torch.no_grad():
                    out = model.generate(
                        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=True,
                        temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=BUDGET, pad_token_id=tokenizer.pad_token_id,
                    )  # fmt: skip
                tokenizer.batch_decode(out)
                total += int((out[:, batch["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum()) + len(out)
            written["theirs"] = total

        timing = alternate(ours, theirs, runs=3, warmup=1)
        assert 0.8 < written["ours"] / written["theirs"] < 1.25, written  # as long on average
        yield timed(f"{len(texts)} traces in batches of {BATCH_SIZE}, {family}", timing, "faster than model.generate")


ROWS = {"adaptive sampling": adaptive, "client": client, "traces": traces}
