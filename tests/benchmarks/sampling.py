"""Rows of the benchmark table: the sampler in this process against lm-eval's `hf` model, on the same weights, prompts,
budget and batch size. Scores and greedy texts must be equal; samples must be as long on average."""

import logging
import random
from collections.abc import Iterator
from statistics import fmean, stdev

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rows import DEVICE, Row, timed

from eval.local_sampler import TransformersSampler
from eval.samplers import Request
from tests.eval.models import FAMILIES, prompts, tiny_lm, tiny_tokenizer

BATCH_SIZE = 16
BUDGET = 128
SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}  # 3M parameters: a laptop does many rows


def both(family: str, ends: float = 0.0, **overrides) -> tuple[TransformersSampler, HFLM]:
    """Our sampler and lm-eval's model on the same weights."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    sizes = {} if family == "deepseek" else SIZES
    model = tiny_lm(family, ends=ends, **sizes, **overrides).to(DEVICE)
    tokenizer = tiny_tokenizer()
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE, max_length=2048, device=DEVICE)
    return TransformersSampler(model, tokenizer, batch_size=BATCH_SIZE), theirs


def mmlu(count: int) -> list[str]:
    """Questions in the form of MMLU behind five worked examples of their subject, about 300 tokens each."""
    noise, out = random.Random(0), []
    for number in range(count):
        subject = number * 3 // count  # three subjects, one after the other
        shots = "".join(
            f"Question {n}: what is {n} plus {n * 7 + subject}?\nA. {n}\nB. {n * 8 + subject}\nC. {n + 3}\nD. {n + 1}\n"
            "Answer: B\n\n"
            for n in range(5)
        )
        question = " plus ".join(str(noise.randrange(1000)) for _ in range(noise.randrange(2, 15)))
        choices = "\n".join(f"{letter}. {noise.randrange(9000)}" for letter in "ABCD")
        out.append(f"The following are about sums {subject}.\n\n{shots}What is {question}?\n{choices}\nAnswer:")
    return out


def loglikelihood(alternate) -> Iterator[Row]:
    texts = mmlu(96)
    for family in FAMILIES:
        for kind, choices in (
            ("letters", (" A", " B", " C", " D")),
            ("long choices", (" one hundred and three", " 12345", " A. 77 or more", " something else")),
        ):
            ours, theirs = both(family, initializer_range=0.02)
            asked = [Request(text, choices=choices, tag=place) for place, text in enumerate(texts)]
            instances = [Instance("loglikelihood", {}, (text, choice), 0) for text in texts for choice in choices]
            done = sorted(ours.sample(asked), key=lambda pair: pair[0].tag)
            values = [value for _, completion in done for value in completion.logprobs]
            expected = [value for value, _ in theirs.loglikelihood(instances, disable_tqdm=True)]
            # In float32 a sum of 20 terms near -6 is itself no better than 1e-5.
            assert all(abs(a - b) < max(1e-5, 1e-6 * abs(b)) for a, b in zip(values, expected, strict=True))
            timing = alternate(
                lambda ours=ours, asked=asked: list(ours.sample(asked)),
                lambda theirs=theirs, instances=instances: theirs.loglikelihood(instances, disable_tqdm=True),
                runs=5,
                warmup=1,
            )
            yield timed(f"log-likelihood, {family}, 96 x 4 {kind}", timing, "faster than lm-eval")


def generate(alternate) -> Iterator[Row]:
    greedy = {"until": [], "max_gen_toks": BUDGET, "do_sample": False}
    hot = {"until": [], "max_gen_toks": BUDGET, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    for family in FAMILIES:
        ours, theirs = both(family, ends=4.0)
        cases = [("64 greedy answers", prompts(64), 1, greedy), ("8 samples of 8 prompts", prompts(8), 8, hot)]
        for name, texts, k, settings in cases:
            temperature = settings.get("temperature", 0.0)
            pairs = [(text, index) for text in texts for index in range(k)]
            asked = [Request(text, place, BUDGET, temperature, tag=place) for place, (text, _) in enumerate(pairs)]
            instances = [Instance("generate_until", {}, (text, settings), 0) for text, _ in pairs]
            written = [completion.text for _, completion in sorted(ours.sample(asked), key=lambda pair: pair[0].tag)]
            expected = theirs.generate_until(instances, disable_tqdm=True)
            if temperature == 0:
                assert written == expected
            lengths = [len(text) for text in written], [len(text) for text in expected]
            error = (stdev(lengths[0]) ** 2 / len(written) + stdev(lengths[1]) ** 2 / len(expected)) ** 0.5
            assert abs(fmean(lengths[0]) - fmean(lengths[1])) < 4 * error
            timing = alternate(
                lambda ours=ours, asked=asked: list(ours.sample(asked)),
                lambda theirs=theirs, instances=instances: theirs.generate_until(instances, disable_tqdm=True),
                runs=5,
                warmup=1,
            )
            yield timed(f"generation, {family}, {name}", timing, "faster than lm-eval")


ROWS = {"log-likelihood": loglikelihood, "generation": generate}
