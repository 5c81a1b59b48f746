"""The sampler in this process: the same sample whatever the batch, greedy as `generate`, scores as lm-eval's."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from eval.decoding import Prefill, choose, rows_for
from eval.local_sampler import TransformersSampler
from eval.sample import Completion
from eval.samplers import Request, Sampler
from tests.eval.models import CHAT_TEMPLATE, FAMILIES, prompts, tiny_lm, tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]


def requests(items: int = 12, k: int = 3, **overrides) -> list[Request]:
    settings = {"max_tokens": 24, "temperature": 0.8, "top_p": 0.95, **overrides}
    return [
        Request(prompt, seed=100 * item + index, tag=f"{item}/{index}", **settings)
        for item, prompt in enumerate(prompts(items))
        for index in range(k)
    ]


def sampled(sampler: Sampler, asked: list[Request]) -> dict[str, Completion]:
    out = {request.tag: completion for request, completion in sampler.sample(asked)}
    assert len(out) == len(asked)
    return out


def small_sampler(family: str = "llama", *, ends: float = 3.0, **options) -> TransformersSampler:
    return TransformersSampler(tiny_lm(family, ends=ends), tiny_tokenizer(), **{"batch_size": 4, **options})


# The same sample whatever the batch, the order, the limit.


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_do_not_depend_on_batch_size_order_or_limit(family):
    asked = requests()
    alone = sampled(small_sampler(family, batch_size=1), asked)
    reasons = Counter(completion.finish_reason for completion in alone.values())
    assert reasons["stop"] >= 5
    assert reasons["length"] >= 2, "answers of different lengths are what makes batching hard"
    assert len({completion.text for completion in alone.values()}) > 20, "samples of one prompt differ"
    for batch_size in (4, 16):
        assert sampled(small_sampler(family, batch_size=batch_size), asked) == alone
    shuffled = random.Random(5).sample(asked, len(asked))
    assert sampled(small_sampler(family, batch_size=16, window=7), shuffled) == alone
    for limit in (4, 8):
        first = [request for request in asked if int(request.tag.split("/")[0]) < limit]
        assert sampled(small_sampler(family), first) == {request.tag: alone[request.tag] for request in first}


def test_killed_and_resumed_gives_the_same_samples(tmp_path):
    """A process is killed while it samples; the next one asks for what is missing."""
    whole = sampled(small_sampler(batch_size=16), requests())
    out = tmp_path / "samples.jsonl"
    program = (
        "import json, sys, time; sys.path.insert(0, '.')\n"
        "import torch; torch.set_num_threads(1)\n"
        "from tests.eval.test_local_sampler import requests, small_sampler\n"
        "for request, completion in small_sampler(batch_size=4).sample(requests()):\n"
        f"    open({str(out)!r}, 'a').write(request.tag + ' ' + completion.to_json() + chr(10)); time.sleep(0.05)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY)
    while not out.exists() or out.read_bytes().count(b"\n") < 10:
        time.sleep(0.02)
        assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = [line.split(" ", 1) for line in out.read_text().split("\n")[:-1]]
    stored = {tag: Completion.from_json(text) for tag, text in lines}
    assert 10 <= len(stored) < len(whole)
    missing = [request for request in requests() if request.tag not in stored]
    assert stored | sampled(small_sampler(batch_size=3), missing) == whole


def test_the_seed_decides_and_only_the_seed():
    sampler = small_sampler()
    same = [Request("Question 1:", seed=7, max_tokens=16, temperature=1.0, tag=str(index)) for index in range(4)]
    assert len(set(sampled(sampler, same).values())) == 1
    other = [Request("Question 1:", seed=seed, max_tokens=16, temperature=1.0, tag=str(seed)) for seed in range(8)]
    assert len({completion.text for completion in sampled(sampler, other).values()}) >= 7


# The distribution.


def test_choose_draws_from_the_softmax_at_the_temperature():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)
    noise = random.Random(0)
    counts = Counter(choose(logits, [0.5] * 20_000, [1.0] * 20_000, [noise.random() for _ in range(20_000)]))
    expected = torch.softmax(logits[0] / 0.5, -1)
    for token, probability in enumerate(expected.tolist()):
        deviation = (probability * (1 - probability) / 20_000) ** 0.5
        assert abs(counts[token] / 20_000 - probability) < 4 * deviation


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_ties():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.1, 0.15]])
    points = [index / 1000 for index in range(1000)]

    def kept(top_p):
        rows = probabilities.log().repeat(1000, 1)
        return set(choose(rows, [1.0] * 1000, [top_p] * 1000, points))

    assert kept(1.0) == {0, 1, 2, 3, 4}
    assert kept(0.49) == {1}  # reaches it by itself
    assert kept(0.6) == {1, 2, 4}  # 2 alone would do, 4 is as likely
    assert kept(0.01) == {1}
    assert kept(0.9) == {0, 1, 2, 3, 4}


def test_the_ends_of_the_uniform_numbers_give_tokens_that_can_be():
    logits = torch.tensor([[-float("inf"), 0.0, 1.0, -float("inf")]])
    assert choose(logits, [1.0], [1.0], [0.0]) == [1]
    assert choose(logits, [1.0], [1.0], [1 - 2**-53]) == [2]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family):
    model, tokenizer = tiny_lm(family, ends=3.0), tiny_tokenizer()
    asked = [Request(prompt, max_tokens=30, tag=prompt) for prompt in prompts(10)]
    lengths = set()
    for prompt, completion in sampled(TransformersSampler(model, tokenizer, batch_size=4), asked).items():
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=30)[0, inputs.input_ids.shape[1] :]
        assert completion.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert completion.completion_tokens == len(tokens)
        assert completion.prompt_tokens == inputs.input_ids.shape[1]
        assert completion.finish_reason == ("stop" if tokens[-1] == tokenizer.eos_token_id else "length")
        lengths.add(len(tokens))
    assert len(lengths) > 3


# Ends.


def test_stop_strings_cut_the_text_before_the_first_of_them():
    plain = sampled(small_sampler(ends=0.0), requests(6, 1, max_tokens=60))
    sampler = small_sampler(ends=0.0)
    for tag, completion in plain.items():
        at = len(completion.text) // 2
        stop = completion.text[at : at + 5]
        earlier = completion.text[at - 3 : at - 1]
        (request,) = [one for one in requests(6, 1, max_tokens=60, stop=(stop, earlier)) if one.tag == tag]
        ((_, cut),) = sampler.sample([request])
        assert cut.text == completion.text[: min(completion.text.find(stop), completion.text.find(earlier))]
        assert cut.finish_reason == "stop"
        assert 0 < cut.completion_tokens < completion.completion_tokens


def test_of_two_stop_strings_in_one_token_the_first_cuts():
    sampler = small_sampler(ends=0.0)
    for _, completion in sampler.sample(requests(12, 1, temperature=0.0, max_tokens=1)):
        if len(set(completion.text)) >= 3 and completion.text.isascii():
            break
    stops = completion.text[2], completion.text[1]
    request = next(
        one for one in requests(12, 1, temperature=0.0, stop=stops) if _writes(sampler, one, completion.text)
    )
    ((_, cut),) = sampler.sample([request])
    assert (cut.text, cut.completion_tokens) == (completion.text[:1], 1)


def _writes(sampler: TransformersSampler, request: Request, text: str) -> bool:
    ((_, completion),) = sampler.sample([Request(request.prompt, max_tokens=1)])
    return completion.text == text


def test_a_stop_string_that_is_a_special_token_ends_the_completion():
    model, tokenizer = tiny_lm(), tiny_tokenizer()
    head = torch.nn.Linear(32, 512)
    head.weight, head.bias = model.lm_head.weight, torch.nn.Parameter(torch.zeros(512))
    head.bias.data[tokenizer.convert_tokens_to_ids("<|end|>")] = 100.0
    model.lm_head = head
    sampler = TransformersSampler(model, tokenizer)
    ((_, stopped),) = sampler.sample([Request("Question", max_tokens=5, stop=("<|end|>",))])
    assert (stopped.text, stopped.finish_reason, stopped.completion_tokens) == ("", "stop", 1)
    ((_, unstopped),) = sampler.sample([Request("Question", max_tokens=5)])
    assert (unstopped.text, unstopped.finish_reason, unstopped.completion_tokens) == ("", "length", 5)


def test_every_end_of_the_generation_config_ends():
    model, tokenizer = tiny_lm(), tiny_tokenizer()
    asked = [Request("Question 3:", max_tokens=20)]
    ((_, plain),) = TransformersSampler(model, tokenizer).sample(asked)
    tokens = tokenizer.encode(plain.text, add_special_tokens=False)
    written = model.generate(**tokenizer("Question 3:", return_tensors="pt"), do_sample=False, max_new_tokens=20)[0]
    third = written[-20:][2].item()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, third]
    ((_, ended),) = TransformersSampler(model, tokenizer).sample(asked)
    assert ended.finish_reason == "stop"
    assert ended.completion_tokens == written[-20:].tolist().index(third) + 1
    assert len(tokens) > 3


@pytest.mark.parametrize("special_tags", [False, True])
def test_tags_of_the_thought_survive_where_a_tokenizer_calls_them_special(special_tags):
    tokenizer = tiny_tokenizer(special_tags=special_tags)
    sampler = TransformersSampler(tiny_lm(), tokenizer)
    tokens = tokenizer.encode("<think>so 2</think>4<|end|></s>", add_special_tokens=False)
    if special_tags:
        assert "<think>" not in tokenizer.decode(tokens, skip_special_tokens=True), "what this guards against"
    assert sampler.decode(tokens) == "<think>so 2</think>4"


# Prompts.


def test_no_second_beginning_of_text():
    tokenizer = tiny_tokenizer(adds_bos=True)
    sampler = TransformersSampler(tiny_lm(), tokenizer)
    rendered = sampler.render([{"role": "user", "content": "2 + 2?"}])
    assert rendered == "<s><|user|>2 + 2?\n<|assistant|>"
    assert sampler.encode(rendered).count(tokenizer.bos_token_id) == 1
    assert sampler.encode("2 + 2?")[0] == tokenizer.bos_token_id


def test_render_opens_the_thought_once():
    sampler = small_sampler()
    chat = [{"role": "user", "content": "2 + 2?"}]
    assert sampler.render(chat, open_thought=False).endswith("<|assistant|>")
    assert sampler.render(chat, open_thought=True).endswith("<|assistant|><think>\n")
    for already in ("<think>\n", "<think>"):
        sampler.tokenizer.chat_template = CHAT_TEMPLATE.replace("<|assistant|>", "<|assistant|>" + already)
        assert sampler.render(chat, open_thought=True).endswith("<|assistant|><think>\n")
    sampler.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template.*protocol for base models"):
        sampler.render(chat, open_thought=True)


def test_messages_as_a_prompt_are_rendered():
    sampler = small_sampler()
    chat = ({"role": "user", "content": "2 + 2?"},)
    ((_, given),) = sampler.sample([Request(chat, max_tokens=8)])
    ((_, text),) = sampler.sample([Request(sampler.render(chat), max_tokens=8)])
    assert given == text


def test_nothing_is_cut_to_fit():
    sampler = small_sampler(context_length=40)
    long = Request("x " * 60, max_tokens=8)
    fits = Request("Question", max_tokens=8)
    count = len(sampler.encode(long.prompt))
    message = rf"prompt of {count} tokens and max_tokens=8 need {count + 8}.*context_length=40"
    with pytest.raises(ValueError, match=message):
        sampler.check([fits, long])
    sampler.check([fits])
    results = {request.prompt: completion for request, completion in sampler.sample([long, fits])}
    assert results[long.prompt].finish_reason == "failed"
    assert f"need {count + 8}" in results[long.prompt].error
    assert results[fits.prompt].finish_reason != "failed"
    with pytest.raises(ValueError, match=r"longest choice of \d+ need"):
        sampler.check([Request("Question " * 3, choices=(" a", " b" * 60))])


def test_the_context_may_be_filled_to_the_last_token():
    sampler = small_sampler(ends=0.0)
    room = sampler.context_length - len(sampler.encode("Question"))
    sampler.check([Request("Question", max_tokens=room)])
    with pytest.raises(ValueError, match="context_length=2048"):
        sampler.check([Request("Question", max_tokens=room + 1)])


# Work is shared and places are refilled.


class Counting(LlamaForCausalLM):
    """Counts forward passes and the tokens in them; runs out of memory above `most` tokens, rows or columns."""

    calls, tokens, most_rows, memory = 0, 0, 0, 10**9

    def forward(self, input_ids=None, past_key_values=None, logits_to_keep=0, **kwargs):
        held = past_key_values.get_seq_length() if past_key_values is not None else 0
        if input_ids.shape[0] * (input_ids.shape[1] + held) > self.memory:
            past_key_values.update(
                *[torch.full((input_ids.shape[0], 2, 1, 8), torch.nan)] * 2, 0
            )  # it broke off inside
            raise torch.OutOfMemoryError("out of memory")
        self.calls += 1
        self.tokens += input_ids.numel()
        self.most_rows = max(self.most_rows, input_ids.shape[0])
        return super().forward(
            input_ids=input_ids, past_key_values=past_key_values, logits_to_keep=logits_to_keep, **kwargs
        )


def counting_sampler(**options) -> TransformersSampler:
    model = tiny_lm(ends=3.0)
    model.__class__ = Counting
    return TransformersSampler(model, tiny_tokenizer(), **options)


def test_samples_of_a_prompt_share_its_prefill():
    sampler = counting_sampler(batch_size=8)
    prompt = prompts(2)[1]
    asked = [Request(prompt, seed=seed, max_tokens=1, temperature=1.0, tag=str(seed)) for seed in range(20)]
    assert len(sampled(sampler, asked)) == 20
    assert sampler.model.calls == 1
    assert sampler.model.tokens == len(sampler.encode(prompt))


def test_prompts_that_begin_alike_share_the_beginning():
    sampler = counting_sampler(batch_size=4)
    shots = "".join(f"Question {n}: what is {n} plus {n}? The answer is {n + n}.\n" for n in range(12))
    asked = [Request(f"{shots}Question {n}: ", max_tokens=1, tag=str(n)) for n in range(20)]
    expected = sampled(TransformersSampler(sampler.model, sampler.tokenizer, batch_size=1, window=1), asked)
    sampler.model.tokens = 0
    assert sampled(sampler, asked) == expected
    shared, total = len(sampler.encode(shots)), sum(len(sampler.encode(request.prompt)) for request in asked)
    assert sampler.model.tokens < shared + 20 * 16 < total / 3


def test_a_row_that_is_done_makes_room():
    """Without refilling, each batch of 4 would take as many steps as its longest answer."""
    sampler = counting_sampler(batch_size=4)
    asked = requests(16, 2, max_tokens=60)
    done = sampled(sampler, asked)
    lengths = [done[request.tag].completion_tokens for request in asked]
    batches = [max(lengths[at : at + 4]) for at in range(0, len(lengths), 4)]
    assert sampler.model.most_rows <= 4
    assert sampler.model.calls < 0.75 * sum(batches)


def test_requests_are_read_as_the_work_goes_on():
    read = 0

    def endless():
        nonlocal read
        for seed in range(10**9):
            read += 1
            yield Request("Question", seed=seed, max_tokens=4, temperature=1.0)

    stream = small_sampler(batch_size=2, window=5).sample(endless())
    for _ in range(30):
        next(stream)
    assert read <= 30 + 5 + 2 + 5
    stream.close()


def test_none_waits_for_a_completion():
    """A request that depends on what came back: three rounds of one prompt each."""
    texts = []

    def rounds():
        for number in range(3):
            yield Request(f"Question {number}: {''.join(texts)}", seed=number, max_tokens=6, temperature=1.0)
            while len(texts) == number:
                yield None

    for _, completion in small_sampler().sample(rounds()):
        texts.append(completion.text)
    assert len(texts) == 3
    with pytest.raises(RuntimeError, match="None"):
        list(small_sampler().sample(iter([None, None])))


# What goes wrong.


@pytest.mark.parametrize("memory", [600, 220, 130])
def test_out_of_memory_halves_what_is_in_flight_and_changes_no_sample(memory):
    asked = requests(8, 3)
    expected = sampled(small_sampler(batch_size=8), asked)
    sampler = counting_sampler(batch_size=8)
    sampler.model.memory = memory
    results = sampled(sampler, asked)
    failed = {tag for tag, completion in results.items() if completion.finish_reason == "failed"}
    for tag, completion in results.items():
        if tag in failed:
            assert "out of memory" in completion.error
        else:
            assert completion == expected[tag]
    alone = {request.tag for request in asked if len(sampler.encode(request.prompt)) > memory - 2}
    assert failed >= alone
    assert len(failed) < len(asked)
    if memory == 600:
        assert not failed
    assert sampler.model.most_rows < 8


def test_scores_survive_a_lack_of_memory():
    asked = [Request(prompt, choices=(" A", " 12 or 13"), tag=prompt) for prompt in prompts(8)]
    expected = sampled(small_sampler(batch_size=8), asked)
    sampler = counting_sampler(batch_size=8)
    sampler.model.memory = 400
    for tag, completion in sampled(sampler, asked).items():
        assert completion.logprobs == pytest.approx(expected[tag].logprobs, abs=1e-4)


def test_a_row_of_nan_fails_alone():
    """A token whose embedding is NaN: the completions that draw it fail, the others are what they were."""
    asked = requests(8, 3)
    expected = sampled(small_sampler(batch_size=8, ends=0.0), asked)
    written = Counter(token for c in expected.values() for token in tiny_tokenizer().encode(c.text))
    sampler = small_sampler(batch_size=8, ends=0.0)
    poison = next(token for token, count in written.most_common() if count < 10)
    sampler.model.model.embed_tokens.weight.data[poison] = torch.nan
    results = sampled(sampler, asked)
    failed = {tag for tag, completion in results.items() if completion.finish_reason == "failed"}
    assert 0 < len(failed) < len(asked)
    for tag, completion in results.items():
        if tag in failed:
            assert "NaN" in completion.error
            assert completion.completion_tokens > 0
        else:
            assert completion == expected[tag]


def test_training_mode_comes_back():
    sampler = small_sampler()
    sampler.model.train()
    stream = sampler.sample(requests(2, 1))
    next(stream)
    assert not sampler.model.training
    stream.close()
    assert sampler.model.training


# Caches.


def test_a_cache_that_cannot_be_cut_by_columns_gives_the_same_samples():
    """A hybrid with linear attention: rows of one length together, none refilled."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, max_position_embeddings=2048, initializer_range=0.2,
    )  # fmt: skip
    model, tokenizer = Qwen3NextForCausalLM(config).eval(), tiny_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert not rows_for(model).ragged
    asked = requests(5, 3, max_tokens=12)
    alone = sampled(TransformersSampler(model, tokenizer, batch_size=1), asked)
    assert sampled(TransformersSampler(model, tokenizer, batch_size=4), asked) == alone
    for request in requests(3, 1, max_tokens=12, temperature=0.0):
        inputs = tokenizer(request.prompt, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs.input_ids.shape[1] :]
        ((_, completion),) = TransformersSampler(model, tokenizer).sample([request])
        assert completion.text == tokenizer.decode(tokens, skip_special_tokens=True)
    choices = [Request(prompt, choices=(" A", " 12 or 13", " what is"), tag=prompt) for prompt in prompts(4)]
    together = sampled(TransformersSampler(model, tokenizer, batch_size=4), choices)
    for prompt, completion in together.items():
        for choice, logprob in zip((" A", " 12 or 13", " what is"), completion.logprobs, strict=True):
            assert logprob == pytest.approx(directly(model, tokenizer, prompt, choice), abs=1e-4)


def test_a_sliding_window_slides():
    """Full keys behind a mask that slides: as `generate` with transformers' sliding cache."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16, max_position_embeddings=2048, initializer_range=0.2,
    )  # fmt: skip
    model, tokenizer = MistralForCausalLM(config).eval(), tiny_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    asked = [Request(prompt, max_tokens=30, tag=prompt) for prompt in prompts(8)]
    for prompt, completion in sampled(TransformersSampler(model, tokenizer, batch_size=4), asked).items():
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=30)[0, inputs.input_ids.shape[1] :]
        assert completion.text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_rows_that_come_and_go_have_the_logits_of_full_passes():
    """Rows are admitted, advanced, dropped and replaced by longer ones; each step's logits equal a full forward."""
    model = tiny_lm("deepseek")
    noise = random.Random(1)
    rows, prefill, texts = rows_for(model), Prefill(model, True), []
    with torch.no_grad():
        for step in range(120):
            if len(texts) < 4 and (step % 3 == 0 or not texts):
                prompt = tuple(noise.randrange(2, 500) for _ in range(noise.randrange(1, 90)))
                filled, logits = prefill([prompt])
                rows.admit([(filled, 0, len(prompt))])
                texts.append([*prompt, logits.argmax().item()])
            logits = rows.forward([text[-1:] for text in texts])[:, -1]
            rows.commit()
            for text, row in zip(texts, logits, strict=True):
                full = model(torch.tensor([text])).logits[0, -1]
                torch.testing.assert_close(row, full, atol=1e-4, rtol=1e-4)
                text.append(noise.randrange(2, 500))
            while texts and noise.random() < 0.3:
                gone = noise.randrange(len(texts))
                rows.drop(gone)
                texts[gone] = texts[-1]
                texts.pop()


def test_a_row_of_nan_leaves_nothing_behind():
    """Its place is taken by a shorter row, beside a longer one: 0 times a NaN that is masked would be NaN."""
    model = tiny_lm()
    rows, prefill = rows_for(model), Prefill(model, True)
    long, other, short = tuple(range(10, 60)), tuple(range(60, 110)), (7, 8, 9)
    with torch.no_grad():
        filled, _ = prefill([other, long])
        for layer in filled.layers:
            layer.keys[1], layer.values[1] = torch.nan, torch.nan
        rows.admit([(filled, 0, len(other)), (filled, 1, len(long))])
        assert rows.forward([[5], [5]])[1].isnan().all()
        rows.commit()
        rows.drop(1)
        later, _ = prefill([short])
        rows.admit([(later, 0, len(short))])
        logits = rows.forward([[6], [6]])[:, -1]
        for text, row in zip(([*other, 5, 6], [*short, 6]), logits, strict=True):
            torch.testing.assert_close(row, model(torch.tensor([text])).logits[0, -1], atol=1e-5, rtol=1e-5)


# Scores.


def directly(model, tokenizer, prompt: str, choice: str) -> float:
    before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + choice)
    with torch.no_grad():
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logprobs[at - 1, whole[at]].item() for at in range(len(before), len(whole)))


MMLU = [
    "The following are multiple choice questions (with answers) about counting.\n\n"
    + "".join(f"Question {n}: what is {n} plus {7 * n}?\nA. {n}\nB. {8 * n}\nAnswer: B\n\n" for n in range(5))
    + f"Question {question}: what is {question} plus {'1 plus ' * (question % 7)}9?\nA. {question}\nB. 4\nAnswer:"
    for question in range(24)
]
CHOICES = [(" A", " B", " C", " D"), (" 17", " one hundred", " A. 4 and more"), ("\nA", " A A")]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_lm_eval(family, adds_bos):
    instance = pytest.importorskip("lm_eval.api.instance")
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny_lm(family, initializer_range=0.05), tiny_tokenizer(adds_bos=adds_bos)
    contexts = [*MMLU, *prompts(8), "Question 5: \n ", "2 +  ", "<s>Question", ""]
    pairs = [(prompt, CHOICES[number % 3]) for number, prompt in enumerate(contexts)]
    asked = [Request(prompt, choices=choices, tag=str(number)) for number, (prompt, choices) in enumerate(pairs)]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=2048).loglikelihood(
        [
            instance.Instance("loglikelihood", {}, (prompt, choice), 0)
            for prompt, choices in pairs
            for choice in choices
        ],
        disable_tqdm=True,
    )
    ours = sampled(TransformersSampler(model, tokenizer, batch_size=4), asked)
    expected = iter(theirs)
    for request in asked:
        completion = ours[request.tag]
        for logprob, greedy in zip(completion.logprobs, completion.choice_greedy, strict=True):
            their_logprob, their_greedy = next(expected)
            assert logprob == pytest.approx(their_logprob, abs=1e-5, rel=0), request.prompt
            assert greedy == their_greedy


def test_scores_count_the_tokens_and_know_what_greedy_writes():
    sampler = small_sampler(ends=0.0)
    prompt = prompts(1)[0]
    ((_, written),) = sampler.sample([Request(prompt, max_tokens=3)])
    greedy = sampler.tokenizer.decode(
        sampler.model.generate(**sampler.tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=3)[
            0, -3:
        ]
    )
    assert greedy == written.text
    tokens = sampler.tokenizer.encode(prompt), sampler.tokenizer.encode(greedy), sampler.tokenizer.encode(" A")
    best, other = sampler.score([(tokens[0], tokens[1]), (tokens[0], tokens[2])])
    assert best.tokens == len(tokens[1])
    assert other.tokens == len(tokens[2])
    assert not other.greedy
    assert best.greedy == (tokens[1] == sampler.encode(prompt + greedy)[len(tokens[0]) :])


def test_scoring_prefills_a_prompt_once():
    sampler = counting_sampler(batch_size=8)
    asked = [Request(prompt, choices=(" A", " B", " 12 or 13")) for prompt in prompts(8)[::2]]
    list(sampler.sample(asked))
    longest = max(len(sampler.encode(request.prompt)) for request in asked)
    assert sampler.model.calls == 2  # the prompts, then what follows the first tokens
    assert sampler.model.tokens <= 4 * longest + 4 * 3 * 6


def test_a_choice_without_tokens_of_its_own_is_refused():
    ((_, completion),) = small_sampler().sample([Request("Question", choices=(" A", ""))])
    assert completion.finish_reason == "failed"
    assert "no token of its own" in completion.error


def test_generation_and_scores_may_be_asked_together():
    mixed = []
    for generate, prompt in zip(requests(8, 1), prompts(8), strict=True):
        mixed += [generate, Request(prompt, choices=(" A", " 12 or 13"), tag="score" + generate.tag)]
    together = sampled(small_sampler(window=3), mixed)
    alone = sampled(small_sampler(), mixed[::2])
    assert {tag: completion for tag, completion in together.items() if not tag.startswith("score")} == alone
    scores = sampled(small_sampler(), mixed[1::2])
    for tag, completion in scores.items():
        assert together[tag].logprobs == pytest.approx(completion.logprobs, abs=1e-5)


# Identity.


def test_identity_names_the_weights_the_tokenizer_and_the_template():
    sampler = small_sampler()
    first = sampler.identity
    json.dumps(first)
    assert sampler.identity == first
    assert small_sampler(batch_size=1).identity == first, "the batch size is none of it"
    sampler.model.lm_head.weight.data[3, 3] += 1e-3
    changed = sampler.identity
    assert {name for name in first if first[name] != changed[name]} == {"weights"}
    sampler = small_sampler()
    sampler.tokenizer.chat_template += " "
    assert {name for name in first if first[name] != sampler.identity[name]} == {"chat_template"}
    sampler = TransformersSampler(tiny_lm(ends=3.0), tiny_tokenizer(adds_bos=True))
    assert {name for name in first if first[name] != sampler.identity[name]} == {"tokenizer"}
    sampler = small_sampler()
    sampler.model.bfloat16()
    assert sampler.identity["dtype"] == "bfloat16"


def test_a_checkpoint_trained_further_at_the_same_path_is_another_model(tmp_path):
    model, tokenizer = tiny_lm("deepseek"), tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = TransformersSampler.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded.model).__module__ == "modeling_deepseek.modeling_deepseek"
    first = loaded.identity
    assert TransformersSampler.from_pretrained(tmp_path, dtype=torch.float32).identity == first
    asked = requests(3, 1)
    assert sampled(loaded, asked) == sampled(TransformersSampler(model, tokenizer), asked)
    model.lm_head.weight.data[5] += 0.5
    model.save_pretrained(tmp_path)
    other = TransformersSampler.from_pretrained(tmp_path, dtype=torch.float32).identity
    assert {name for name in first if first[name] != other[name]} == {"weights"}


def test_request_refuses_what_cannot_be_asked():
    with pytest.raises(ValueError, match="max_tokens=0"):
        Request("x")
    with pytest.raises(ValueError, match="temperature=-1"):
        Request("x", max_tokens=1, temperature=-1)
    with pytest.raises(ValueError, match="top_p=0"):
        Request("x", max_tokens=1, top_p=0)
    with pytest.raises(ValueError, match="empty string"):
        Request("x", max_tokens=1, stop=("",))
    assert Request("x", max_tokens=1, tag=1) == Request("x", max_tokens=1, tag=2)
    with pytest.raises(ValueError, match="batch_size=0"):
        TransformersSampler(tiny_lm(), tiny_tokenizer(), batch_size=0)
