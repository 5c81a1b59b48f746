"""Speculation changes no token of greedy decoding and no probability of sampling, whatever the batch, the cache, the
processors and the criteria; the modules see what they saw in training; and how many drafts there are follows from how
they fared."""

import itertools
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import transformers.integrations.flex_attention as transformers_flex
from scipy.stats import chi2
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    StaticCache,
    masking_utils,
)
from transformers.generation import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import modeling_deepseek.speculation as speculation
from modeling_deepseek.drafting import Drafter, Pace, Rows, round_costs
from modeling_deepseek.row_cache import Columns, RowLayer
from modeling_deepseek.speculation import keep_greedy, keep_sampled
from tests.caches import LOSSLESS, MAX_LENGTH, new_cache
from tests.tiny import tiny_model, tokens

TEACHER = Path(__file__).parents[2] / "recipes" / "tiny_teacher"
PROMPT, NEW = 9, 14
LEFT_MASK = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 9, [0] * 8 + [1]])
QUESTIONS = [
    "State the final answer to the following arithmetic problem: 4 + 5 - 3 =",
    "Find the Greatest Common Divisor (GCD) of these numbers: 30, 12. Give only the GCD as your final answer.",
    'How many times does the letter "e" appear in the text: "they went there before"?',
    "Spell this word backward (example: sun -> nus): bread",
    "State the final answer to the following arithmetic problem: 27 + 8 =",
    "Find the Greatest Common Divisor (GCD) of these numbers: 7, 3. Give only the GCD as your final answer.",
    "Spell this word backward (example: sun -> nus): to",
    'How many times does the letter "s" appear in the text: "she sells"?',
]


@cache
def teacher():
    return AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER, padding_side="left")


def prompts(count: int):
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS[:count]]
    return tokenizer().apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


@cache
def tiny(modules: int = 1, **overrides):
    model = tiny_model(num_nextn_predict_layers=modules, **overrides)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def generate(model, input_ids=None, **options):
    return model.generate(
        input_ids, **{"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **options}
    )


@pytest.fixture
def good_drafts(monkeypatch):
    """Random models never guess each other's tokens. Here two drafts of three are what plain decoding came to, given
    by the test, and the modules run all the same."""
    expected: list[list[int]] = []
    own = Rows.add_draft

    def add_draft(self, logits_B1V, lengths):
        own(self, logits_B1V, lengths)
        for row, length in enumerate(lengths):
            if self.active[row] and length < len(expected[row]) and (length * 7 + row * length + row) % 3:
                self.sequences_BS[row, length] = expected[row][length]

    monkeypatch.setattr(Rows, "add_draft", add_draft)
    return expected


def assert_same(plain, speculative):
    """The same tokens, and the same scores, logits and latents where both have them."""
    assert speculative.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        expected, actual = getattr(plain, name), getattr(speculative, name)
        assert (expected is None) == (actual is None)
        for one, other in zip(expected or (), actual or (), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def assert_same_cache(plain, speculative, length):
    for one, other in zip(plain.layers, speculative.layers, strict=True):
        assert type(one) is type(other)
        assert one.keys.shape == other.keys.shape
        assert int(one.get_seq_length()) == int(other.get_seq_length()) == length
        torch.testing.assert_close(other.keys[:, :, :length], one.keys[:, :, :length], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.values[:, :, :length], one.values[:, :, :length], rtol=1e-4, atol=1e-5)


# Greedy decoding.


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_greedy_tokens_of_a_trained_model(batch):
    plain = generate(teacher(), **prompts(batch), max_new_tokens=60)
    speculative = generate(teacher(), **prompts(batch), max_new_tokens=60, use_mtp=True)
    assert_same(plain, speculative)
    assert_same_cache(plain.past_key_values, speculative.past_key_values, plain.sequences.shape[1] - 1)
    # A trained module is right nearly always with the first draft, and mostly with all of them together.
    assert speculative.acceptance[0] > 0.9
    assert speculative.accepted.sum() > 0.5 * speculative.drafted.sum()
    assert speculative.rounds < 0.6 * (plain.sequences.shape[1] - prompts(batch)["input_ids"].shape[1])
    # In = out: every round gives one token and the drafts that were kept, up to where the row stopped.
    assert (speculative.accepted <= speculative.drafted).all()
    assert speculative.drafted.shape == speculative.accepted.shape
    if batch == 1:
        new = speculative.sequences.shape[1] - prompts(1)["input_ids"].shape[1]
        cut = 1 + speculative.rounds + speculative.accepted.sum() - new  # tokens behind the stop
        assert 0 <= cut <= speculative.drafted.shape[1]


def test_counts_where_the_length_ends_the_rows():
    for new in range(3, 9):
        output = generate(teacher(), **prompts(3), max_new_tokens=new, use_mtp=True)
        assert (output.accepted <= output.drafted).all()


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize(("modules", "batch"), [(1, 1), (1, 4), (3, 4)])
def test_every_cache(modules, batch, name, good_drafts, monkeypatch):
    model, input_ids, mask = tiny(modules), tokens(4, PROMPT)[-batch:], LEFT_MASK[-batch:]
    caches = [new_cache(name, model.config, monkeypatch) for _ in range(2)]
    plain = generate(model, input_ids, attention_mask=mask, past_key_values=caches[0])
    good_drafts[:] = plain.sequences.tolist()
    speculative = generate(model, input_ids, attention_mask=mask, past_key_values=caches[1], use_mtp=True)
    assert_same(plain, speculative)
    assert speculative.past_key_values is caches[1]
    assert 0 < speculative.accepted.sum() < speculative.drafted.sum()
    if batch > 1:  # rows are at their own pace
        assert len(set(speculative.accepted.sum(1).tolist())) > 1
    assert_same_cache(*caches, PROMPT + NEW - 1)


@pytest.mark.parametrize("spare", [0, 1, 5])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_static_cache_of_the_length_that_plain_decoding_needs(batch, spare, good_drafts):
    model, input_ids, mask = tiny(), tokens(4, PROMPT)[:batch], LEFT_MASK[:batch]
    plain = generate(model, input_ids, attention_mask=mask)
    good_drafts[:] = plain.sequences.tolist()
    static = StaticCache(model.config, max_cache_len=PROMPT + NEW - 1 + spare)
    speculative = generate(model, input_ids, attention_mask=mask, past_key_values=static, use_mtp=True)
    assert_same(plain, speculative)
    made = generate(model, input_ids, attention_mask=mask, cache_implementation="static", use_mtp=True)
    assert_same(plain, made)
    small = StaticCache(model.config, max_cache_len=20)
    with pytest.raises(ValueError, match="holds 20 tokens"):
        generate(model, input_ids, attention_mask=mask, past_key_values=small, use_mtp=True)


@pytest.fixture
def flex(monkeypatch):
    """flex_attention without torch.compile, which would take a minute."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)

    def plain(query, key, value, training=False, **kwargs):
        return torch_flex.flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", plain)
    create = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **kwargs: create(**{**kwargs, "_compile": False}))


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("path", ["auto", "absorbed", "expanded"])
def test_every_path_and_attention(path, implementation, good_drafts):
    model = tiny(mla_path=path, attn_implementation=implementation)
    options = {"attention_mask": LEFT_MASK, "max_new_tokens": 8}
    plain = generate(tiny(), tokens(4, PROMPT), **options)
    good_drafts[:] = plain.sequences.tolist()
    assert_same(plain, generate(model, tokens(4, PROMPT), **options, use_mtp=True))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("modules", [1, 2])
def test_rounds_without_drafts(modules, batch, good_drafts, monkeypatch):
    """What the modules miss meanwhile they see later."""
    model, input_ids, mask = tiny(modules), tokens(4, PROMPT)[-batch:], LEFT_MASK[-batch:]
    plain = generate(model, input_ids, attention_mask=mask, max_new_tokens=24)
    good_drafts[:] = plain.sequences.tolist()
    counts = itertools.cycle([0, 0, 2, 0, 3, 2, 0, 0])
    monkeypatch.setattr(Pace, "choose", lambda self, rooms: min(next(counts), max(rooms)))
    speculative = generate(model, input_ids, attention_mask=mask, max_new_tokens=24, use_mtp=True)
    assert_same(plain, speculative)
    assert speculative.drafted.sum() > 0


def test_a_conversation_goes_on_in_its_cache(good_drafts):
    model, first = tiny(), tokens(2, PROMPT)
    plain_cache, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    plain = generate(model, first, past_key_values=plain_cache)
    good_drafts[:] = plain.sequences.tolist()
    answer = generate(model, first, past_key_values=cache, use_mtp=True)
    assert_same(plain, answer)
    second = torch.cat([answer.sequences, tokens(2, 3, seed=7)], dim=1)
    plain = generate(model, second, past_key_values=plain_cache)
    good_drafts[:] = plain.sequences.tolist()
    assert_same(plain, generate(model, second, past_key_values=cache, use_mtp=True))
    assert_same_cache(plain_cache, cache, PROMPT + NEW + 3 + NEW - 1)


def test_a_conversation_of_padded_rows_that_ended_at_different_times():
    # The cache holds the end token and the padding of rows that were done early, as in plain decoding.
    questions = prompts(3)
    plain, speculative = (generate(teacher(), **questions, max_new_tokens=40, use_mtp=use) for use in (False, True))
    ends = [row.index(2) for row in plain.sequences.tolist() if 2 in row]
    assert min(ends) < plain.sequences.shape[1] - 2  # some row was done early
    follow = torch.cat([plain.sequences, tokens(3, 4)], dim=1)
    mask = torch.cat([questions["attention_mask"], torch.ones_like(follow)], dim=1)[:, : follow.shape[1]]
    again = [
        generate(
            teacher(), follow, attention_mask=mask, past_key_values=one.past_key_values, max_new_tokens=6, use_mtp=use
        )
        for one, use in ((plain, False), (speculative, True))
    ]
    assert_same(*again)


def test_the_cache_is_whole_after_an_interruption(good_drafts):
    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] > PROMPT + 6:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model, cache = tiny(), DynamicCache(config=tiny().config)
    good_drafts[:] = generate(model, tokens(1, PROMPT)).sequences.tolist()
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokens(1, PROMPT), past_key_values=cache, stopping_criteria=[Stop()], use_mtp=True)
    held = cache.get_seq_length()
    assert PROMPT <= held <= PROMPT + 7
    sequence = torch.tensor(good_drafts)[:, : held + 1]
    left = PROMPT + NEW - held - 1
    again = generate(model, sequence, past_key_values=cache, max_new_tokens=left)
    assert again.sequences.tolist() == good_drafts


def test_prompts_as_embeddings(good_drafts):
    model, input_ids = tiny(2), tokens(4, PROMPT)
    embeds = model.get_input_embeddings()(input_ids)
    plain = generate(model, inputs_embeds=embeds, attention_mask=LEFT_MASK)
    assert plain.sequences.shape == (4, NEW)
    good_drafts[:] = plain.sequences.tolist()
    assert_same(plain, generate(model, inputs_embeds=embeds, attention_mask=LEFT_MASK, use_mtp=True))


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("modules", [1, 3])
def test_chunked_prefill(modules, chunk, good_drafts):
    model, input_ids = tiny(modules), tokens(4, PROMPT)
    plain = generate(model, input_ids, attention_mask=LEFT_MASK)
    good_drafts[:] = plain.sequences.tolist()
    options = {"attention_mask": LEFT_MASK, "use_mtp": True, "prefill_chunk_size": chunk}
    assert_same(plain, generate(model, input_ids, **options))


@pytest.mark.parametrize("length", [1, 2])
def test_prompts_shorter_than_the_modules_reach(length):
    model = tiny(3)
    assert_same(generate(model, tokens(2, length)), generate(model, tokens(2, length), use_mtp=True))


@pytest.mark.parametrize("new", [1, 2])
def test_room_for_hardly_a_draft(new):
    for model in (tiny(1), tiny(3)):
        plain = generate(model, tokens(2, PROMPT), max_new_tokens=new)
        assert_same(plain, generate(model, tokens(2, PROMPT), max_new_tokens=new, use_mtp=True))


def test_several_sequences_of_one_prompt():
    torch.manual_seed(0)
    output = generate(teacher(), **prompts(2), do_sample=True, num_return_sequences=3, max_new_tokens=40, use_mtp=True)
    assert output.sequences.shape[0] == 6
    assert output.drafted.shape[0] == 6


def test_the_generation_config_can_say_so(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    model.generation_config.use_mtp = True
    model.generation_config.num_assistant_tokens = 1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert generate(loaded, **prompts(1)).drafted.shape == (1, 1)
    assert generate(loaded, **prompts(1), num_assistant_tokens=2).drafted.shape == (1, 2)
    assert not hasattr(generate(loaded, **prompts(1), use_mtp=False), "drafted")
    assert isinstance(generate(loaded, **prompts(1), return_dict_in_generate=False), torch.Tensor)
    without = AutoModelForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=0)
    assert_same(generate(without, **prompts(1)), generate(loaded, **prompts(1), use_mtp=False))
    with pytest.raises(ValueError, match="this model has none"):
        generate(without, **prompts(1), use_mtp=True)


def test_layers_on_disk(tmp_path, good_drafts):
    """Their weights are there only while they run, and absorbed attention reads one without running its layer."""
    tiny().save_pretrained(tmp_path)
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {f"model.layers.{index}": "disk" if index else "cpu" for index in range(len(tiny().model.layers))}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    plain = generate(tiny(), tokens(1, PROMPT), max_new_tokens=6)
    good_drafts[:] = plain.sequences.tolist()
    for use in (False, True):
        options = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6, "use_mtp": use}
        assert_same(plain, generate(model, tokens(1, PROMPT), **options))


opened: list[str] | None = None


def _audit(event, arguments):
    if event == "open" and opened is not None:
        opened.append(str(arguments[0]))


def test_no_file_is_opened():
    global opened
    sys.addaudithook(_audit)
    generate(teacher(), **prompts(1), use_mtp=True)
    opened = []
    generate(teacher(), **prompts(1), use_mtp=True)
    found, opened = opened, None
    assert found == []


# Processors, criteria, streamers.


class EvenRowsAvoidWhatTheySaid(LogitsProcessor):
    """Depends on the row and on all tokens before."""

    def __call__(self, input_ids, scores):
        said = torch.zeros_like(scores).scatter_(1, input_ids, 1.0)
        said[1::2] = 0
        return scores - 3 * said


PROCESSORS = {
    "none": {},
    "repetition": {"repetition_penalty": 1.5},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[7], [3, 5]]},
    "bias": {"sequence_bias": [[[9, 4], 5.0], [[4], 2.0]]},
    "first and last": {"forced_eos_token_id": 11, "begin_suppress_tokens": [5, 6], "suppress_tokens": [8]},
    "long enough": {"eos_token_id": list(range(2, 80)), "min_new_tokens": 6},
    "decay": {"eos_token_id": 5, "exponential_decay_length_penalty": (4, 1.6)},
    "by row": {"logits_processor": [EvenRowsAvoidWhatTheySaid()]},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, prefix: [(len(prefix) * 5 + row + i) % 256 for i in range(9)]},
    "mixed": {"suppress_tokens": [8], "repetition_penalty": 1.3, "renormalize_logits": True, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_see_the_tokens_before(name, good_drafts):
    model, input_ids = tiny(), tokens(4, PROMPT)
    options = {"attention_mask": LEFT_MASK, "output_scores": True, "output_logits": True, **PROCESSORS[name]}
    plain = generate(model, input_ids, **options)
    good_drafts[:] = plain.sequences.tolist()
    speculative = generate(model, input_ids, **options, use_mtp=True)
    assert_same(plain, speculative)
    assert speculative.accepted.sum() > 0


@pytest.mark.parametrize("batch", [1, 4])
def test_a_grammar_is_asked_for_nothing_that_breaks_it(batch, good_drafts, monkeypatch):
    """Each row has a grammar of its own, with nothing behind the end token. Where there is no continuation
    transformers raises; in plain decoding it only asks for the padding of rows that are done."""
    model, input_ids, mask, eos = tiny(), tokens(4, PROMPT)[-batch:], LEFT_MASK[-batch:], 4
    right = generate(model, input_ids, attention_mask=mask).sequences.tolist()
    for row, length in zip(right, (9, 14, 3, 8), strict=False):
        row[PROMPT + length - 1 :] = [eos]

    def allowed(row, prefix):
        """The right token, or another one and nothing but 7 from there on."""
        said, expected = prefix.tolist(), right[row]
        if batch > 1 and said[-1] in (0, eos) and len(said) > PROMPT:
            return [0]
        for one, other in zip(said, expected, strict=False):
            if one != other:
                return [7] * (one == other + 1)
        return [expected[len(said)], expected[len(said)] + 1][: 1 + (len(said) + 1 < len(expected))]

    class Grammar(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert all(any(allowed(row, said) for row in range(batch)) for said in input_ids)
            return scores

    monkeypatch.setattr(Pace, "choose", lambda self, rooms: min(4, max(rooms)))  # beyond the end token, too
    good_drafts[:] = right
    options = {"attention_mask": mask, "eos_token_id": eos, "prefix_allowed_tokens_fn": allowed}
    plain = generate(model, input_ids, **options)
    assert plain.sequences[0, PROMPT:].tolist()[8] == eos
    speculative = generate(model, input_ids, **options, logits_processor=[Grammar()], use_mtp=True)
    assert_same(plain, speculative)
    assert 0 < speculative.accepted.sum() < speculative.drafted.sum()


class Together(StoppingCriteria):
    """Looks at all rows, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.full((len(input_ids),), int((input_ids[:, PROMPT:] % 5 == 2).sum()) > 5 or self.calls == 11)


@pytest.mark.parametrize("eos", [None, 299 - 45])
def test_criteria_see_what_they_see_in_plain_decoding(eos, good_drafts):
    model, input_ids = tiny(), tokens(4, PROMPT)
    options = {"attention_mask": LEFT_MASK, "eos_token_id": eos, "output_scores": True}
    good_drafts[:] = generate(model, input_ids, **options).sequences.tolist()
    plain, speculative = (
        generate(model, input_ids, **options, stopping_criteria=[Together()], use_mtp=use) for use in (False, True)
    )
    assert PROMPT + 1 < plain.sequences.shape[1] < PROMPT + NEW
    assert_same(plain, speculative)
    assert_same_cache(plain.past_key_values, speculative.past_key_values, plain.sequences.shape[1] - 1)


class After(StoppingCriteria):
    """Stops each row at a length of its own."""

    def __init__(self, *lengths):
        self.lengths = lengths

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= PROMPT + length for length in self.lengths])


@pytest.mark.parametrize("eos", [None, 300 - 45])
@pytest.mark.parametrize("lengths", [(5, 2, 9, 3), (1, 1, 1, 1), (14, 1, 1, 1)])
def test_rows_stop_where_plain_decoding_stops_them(lengths, eos, good_drafts):
    # With an end token rows that are done are padded; without one plain decoding goes on with them till all are done.
    model, input_ids = tiny(), tokens(4, PROMPT)
    options = {"attention_mask": LEFT_MASK, "eos_token_id": eos, "output_scores": True}
    good_drafts[:] = generate(model, input_ids, **options).sequences.tolist()
    options["stopping_criteria"] = [After(*lengths)]
    plain = generate(model, input_ids, **options)
    assert plain.sequences.shape[1] == PROMPT + max(lengths)
    speculative = generate(model, input_ids, **options, use_mtp=True)
    assert_same(plain, speculative)
    assert_same_cache(plain.past_key_values, speculative.past_key_values, PROMPT + max(lengths) - 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_stop_strings(batch):
    options = {"stop_strings": ["= 2 *", "1y", "</think>"], "tokenizer": tokenizer(), "max_new_tokens": 40}
    plain = generate(teacher(), **prompts(batch), **options)
    assert plain.sequences.shape[1] < prompts(batch)["input_ids"].shape[1] + 40
    assert_same(plain, generate(teacher(), **prompts(batch), **options, use_mtp=True))


def test_max_time():
    output = generate(teacher(), **prompts(2), max_time=1e-9, max_new_tokens=40, use_mtp=True)
    assert output.sequences.shape[1] == prompts(2)["input_ids"].shape[1] + 1


class Collect(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], 0

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("batch", [1, 3])
def test_a_streamer_gets_what_it_gets_in_plain_decoding(batch):
    streamers = [Collect(), Collect()]
    for use, streamer in zip((False, True), streamers, strict=True):
        generate(teacher(), **prompts(batch), max_new_tokens=40, streamer=streamer, use_mtp=use)
    assert streamers[1].pieces == streamers[0].pieces
    assert streamers[1].ended == 1


# What the modules see.


@torch.no_grad()
def drafts_by_full_passes(model, sequence: list[int], count: int) -> list[torch.Tensor]:
    """Logits of each draft behind a sequence, every module run over all of it, with no cache (V3 2.2)."""
    after_norm = model.config.mtp_hidden_state == "after_norm"
    outputs = model.model(torch.tensor([sequence]), use_cache=False)
    states = (outputs.last_hidden_state if after_norm else outputs.pre_norm_hidden_state)[:, :-1]
    modules, tokens_so_far, logits = model.model.layers[model.config.num_hidden_layers :], list(sequence), []
    inputs = states
    for step in range(count):
        depth = min(step + 1, len(modules))
        if step >= len(modules):  # the last module again, on its own last output
            states = torch.cat([inputs, states[:, -1:]], dim=1)
        inputs = states
        module, length = modules[depth - 1], states.shape[1]
        hidden = module(
            states,
            model.model.embed_tokens(torch.tensor([tokens_so_far[depth : depth + length]])),
            position_embeddings=model.model.rotary_emb(torch.arange(length)[None]),
            attention_mask=torch.full((length, length), -torch.inf).triu(1)[None, None],
        ).hidden_states
        normed = module.shared_head.norm(hidden)
        states = normed if after_norm else hidden
        logits.append(model.lm_head(normed[:, -1]))
        tokens_so_far.append(int(logits[-1].argmax()))
    return logits


@pytest.mark.parametrize("state", ["after_norm", "before_norm"])
@pytest.mark.parametrize("modules", [1, 2, 3])
def test_drafts_are_those_of_full_passes(modules, state, monkeypatch):
    model = tiny(modules, mtp_hidden_state=state)
    input_ids = tokens(4, PROMPT)
    checked, own = [], Rows.add_draft

    def add_draft(self, logits_B1V, lengths):
        step = len(checked[-1])
        for row in itertools.compress(range(4), self.active):
            prefix = self.sequences_BS[row, PROMPT - LEFT_MASK[row].sum() : lengths[row] - step].tolist()
            expected = drafts_by_full_passes(model, prefix, step + 1)[step]
            torch.testing.assert_close(logits_B1V[row], expected, rtol=1e-4, atol=1e-4)
        checked[-1].append(step)
        own(self, logits_B1V, lengths)

    # Some drafts right, so that rows have different lengths, and the caches' later entries are written again.
    def settled(scores_BQV, drafts_BK):
        best = scores_BQV.argmax(-1)
        kept = torch.tensor([0, 1, 2, 4])[: len(best)].clamp(max=drafts_BK.shape[1])
        best[:, :-1] = drafts_BK
        return kept, best

    # Rounds without drafts between them: what the modules missed they see later, or when too much of it waits.
    counts, widths, own_draft = itertools.cycle([4, 0, 0, 0, 4]), [], Drafter.draft

    def counted(self, rooms):
        checked.append([])
        return min(next(counts), max(rooms)) if max(rooms) >= modules else 0

    def draft(self, count, states_BQD, *args):
        widths.append((count, states_BQD.shape[1]))
        own_draft(self, count, states_BQD, *args)

    monkeypatch.setattr(Drafter, "draft", draft)
    monkeypatch.setattr(speculation, "MOST_WAITING", 2)
    monkeypatch.setattr(speculation, "keep_greedy", settled)
    monkeypatch.setattr(Rows, "add_draft", add_draft)
    monkeypatch.setattr(Pace, "choose", counted)
    generate(model, input_ids, attention_mask=LEFT_MASK, max_new_tokens=10, use_mtp=True)
    assert sum(map(len, checked)) > 5
    assert (0, 2) in widths


# Sampling.


def significance(counts: dict, expected: dict) -> float:
    """p-value of a chi-squared test; outcomes expected fewer than 5 times are one."""
    total, statistic, cells = sum(counts.values()), 0.0, 0
    assert set(counts) <= {outcome for outcome, share in expected.items() if share > 0}
    rare_seen, rare = 0, 0.0
    for outcome, share in expected.items():
        if share * total < 5:
            rare, rare_seen = rare + share * total, rare_seen + counts.get(outcome, 0)
        else:
            statistic += (counts.get(outcome, 0) - share * total) ** 2 / (share * total)
            cells += 1
    if rare >= 5:
        statistic, cells = statistic + (rare_seen - rare) ** 2 / rare, cells + 1
    return float(chi2.sf(statistic, cells - 1))


P = torch.tensor([0.5, 0.3, 0.2, 0.0])
Q = torch.tensor([0.1, 0.2, 0.3, 0.4])


def first_tokens(keep, count: int) -> Counter:
    drafts = torch.multinomial(Q.expand(count, 4), 1)
    _, tokens_BQ = keep(P.expand(count, 2, 4), drafts, Q.expand(count, 1, 4))
    return Counter(tokens_BQ[:, 0].tolist())


def test_a_draft_that_is_kept_or_replaced_is_distributed_as_the_model_says():
    torch.manual_seed(1)
    expected = dict(enumerate(P.tolist()))
    assert significance(first_tokens(keep_sampled, 20_000), expected) > 0.001
    # 0.1 + 0.2 + 0.2 of the drafts are kept.
    drafts = torch.multinomial(Q.expand(20_000, 4), 1)
    kept, _ = keep_sampled(P.expand(20_000, 2, 4), drafts, Q.expand(20_000, 1, 4))
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.02)


def accepts_with_p(probs_BQV, drafts_BK, draft_probs_BKV):
    """p in place of min(1, p / q), the rest as it should be."""
    count = drafts_BK.shape[1]
    p_BK = probs_BQV[:, :count].gather(2, drafts_BK[..., None]).squeeze(2)
    kept_B, rows = (torch.rand_like(p_BK) < p_BK).cumprod(1).sum(1), torch.arange(len(drafts_BK))
    if count == 0:
        return keep_sampled(probs_BQV, drafts_BK, draft_probs_BKV)
    q_BQV = torch.cat([draft_probs_BKV, torch.zeros_like(probs_BQV[:, :1])], dim=1)
    rest = (probs_BQV - q_BQV)[rows, kept_B].clamp(min=0) + 1e-12
    chosen = torch.cat([drafts_BK, drafts_BK[:, -1:]], dim=1)
    chosen[rows, kept_B] = torch.multinomial(rest, 1).squeeze(1)
    return kept_B, chosen


def draws_from_p_where_a_draft_is_rejected(probs_BQV, drafts_BK, draft_probs_BKV):
    kept, chosen = keep_sampled(probs_BQV, drafts_BK, draft_probs_BKV)
    rows = torch.arange(len(kept))
    chosen[rows, kept] = torch.multinomial(probs_BQV[rows, kept], 1).squeeze(1)
    return kept, chosen


def keeps_every_draft(probs_BQV, drafts_BK, draft_probs_BKV):
    last = torch.multinomial(probs_BQV[:, -1], 1)
    return torch.full((len(last),), drafts_BK.shape[1]), torch.cat([drafts_BK, last], dim=1)


WRONG = [accepts_with_p, draws_from_p_where_a_draft_is_rejected, keeps_every_draft]


@pytest.mark.parametrize("wrong", WRONG)
def test_classic_mistakes_would_be_seen(wrong):
    torch.manual_seed(1)
    counts = first_tokens(wrong, 20_000)
    expected = {token: share or 1e-9 for token, share in enumerate(P.tolist())}
    assert significance(counts, expected) < 1e-6


WORDS, STEPS = 5, 4  # 625 outcomes
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 4, "repetition_penalty": 1.2, "max_new_tokens": STEPS}


@cache
def model_of_few_words():
    model = tiny(
        num_hidden_layers=2,
        vocab_size=WORDS,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    return model


@cache
@torch.no_grad()
def every_outcome(prompt: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """The exact probability of each continuation under plain sampling, by passes over all of them."""
    model, shares = model_of_few_words(), {(): 1.0}
    for _ in range(STEPS):
        prefixes = list(shares)
        input_ids = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        config, _ = model._prepare_generation_config(None, **SAMPLING)
        processors = model._get_logits_processor(config, input_ids_seq_length=len(prompt), device="cpu")
        scores = processors(input_ids, model(input_ids, use_cache=False).logits[:, -1].float())
        probs = scores.softmax(-1).tolist()
        shares = {
            (*prefix, word): shares[prefix] * row[word]
            for prefix, row in zip(prefixes, probs, strict=True)
            for word in range(WORDS)
        }
    return shares


def sample(count: int, prompt: tuple[int, ...], **options) -> tuple[Counter, object]:
    """Continuations of `count` copies of a prompt, half of them padded."""
    input_ids = torch.tensor([prompt, prompt])
    mask = torch.ones_like(input_ids)
    input_ids = torch.cat([torch.zeros(2, 2, dtype=torch.int64), input_ids], dim=1)
    mask = torch.cat([torch.zeros(2, 2, dtype=torch.int64), mask], dim=1)
    counts: Counter = Counter()
    for _ in range(count // 500):  # so many rows at once that drafts do not pay: the caller says how many
        output = generate(
            model_of_few_words(), input_ids, attention_mask=mask, num_return_sequences=250, use_mtp=True, **SAMPLING
        )
        counts.update(map(tuple, output.sequences[:, -STEPS:].tolist()))
    return counts, output


@pytest.fixture
def three_drafts(monkeypatch):
    monkeypatch.setattr(Pace, "choose", lambda self, rooms: min(3, max(rooms)))


@pytest.mark.usefixtures("three_drafts")
@pytest.mark.parametrize("seed", [0])
def test_sampled_sequences_are_distributed_as_plain_sampling_says(seed):
    torch.manual_seed(seed)
    prompt = (3, 1, 4, 1, 2)
    assert sum(every_outcome(prompt).values()) == pytest.approx(1, abs=1e-5)
    counts, output = sample(2500, prompt)  # 10,000 tokens
    assert 0.2 < output.acceptance[0] < 0.95  # there is something to reject and something to keep
    assert significance(counts, every_outcome(prompt)) > 0.001


@pytest.mark.slow
@pytest.mark.usefixtures("three_drafts")
def test_a_hundred_thousand_sampled_tokens():
    for seed, prompt in enumerate([(3, 1, 4, 1, 2), (2, 2)]):
        torch.manual_seed(seed)
        counts, _ = sample(25_000, prompt)
        assert significance(counts, every_outcome(prompt)) > 0.001


@pytest.mark.usefixtures("three_drafts")
@pytest.mark.parametrize("wrong", WRONG)
def test_classic_mistakes_would_be_seen_in_sequences(wrong, monkeypatch):
    monkeypatch.setattr(speculation, "keep_sampled", wrong)
    torch.manual_seed(0)
    counts, _ = sample(2500, (3, 1, 4, 1, 2))
    expected = {outcome: max(share, 1e-9) for outcome, share in every_outcome((3, 1, 4, 1, 2)).items()}
    assert significance(counts, expected) < 0.001


def test_sampling_with_a_seed():
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(generate(teacher(), **prompts(3), do_sample=True, max_new_tokens=30, use_mtp=True))
    assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist()


# How many drafts.


def test_the_number_of_drafts_follows_from_their_past():
    free = Pace([1.0] * 7, fewest=1)
    assert free.choose([6]) == 6  # drafts that cost nothing
    assert free.choose([2, 1]) == 2  # no more than can be used
    assert free.choose([0]) == 0
    dear = Pace([1.0, 1.9, 2.8, 3.7], fewest=1)
    assert dear.choose([3]) == 0  # 1.7 tokens for 1.9
    pace = Pace([1.0, 1.3, 1.6, 1.9], fewest=1)
    # Before anything is known 0.7 of each are expected: 1.7 / 1.3 = 1.31, 2.19 / 1.6 = 1.37, 2.53 / 1.9 = 1.33.
    assert pace.choose([9]) == 2
    for _ in range(20):  # only the first is ever right
        pace.learn(3, 1)
        pace.forget()
    assert pace.choose([9]) == 1
    for _ in range(40):
        pace.learn(1, 0)
        pace.forget()
    assert pace.choose([9]) == 0
    for _ in range(300):  # and what is long ago counts less: another try
        pace.forget()
    assert pace.choose([9]) > 0


def test_rates_are_conditional():
    pace = Pace([1.0] * 4, fewest=1)
    for kept in (0, 1, 1, 3):
        pace.learn(3, kept)
    assert pace.tried == [4, 3, 1]
    assert pace.kept == [3, 1, 1]
    first = (3 + 4 * 0.7) / 8
    assert pace.rates()[:2] == pytest.approx([first, (1 + 4 * first) / 7])


def test_modules_are_used_together_or_not_at_all():
    assert Pace([1.0, 1.1, 9.0, 9.0], fewest=2).choose([3]) == 0


def test_costs_of_a_round():
    model = teacher()
    costs = round_costs(model, list(model.model.layers[4:]), 1, 6)
    assert costs[0] == 1
    assert all(one < other for one, other in itertools.pairwise(costs))
    assert 1.3 < costs[1] < 1.5  # one layer of four on top, and what goes with it


def test_more_drafts_where_more_are_right(good_drafts):
    model = tiny()
    good_drafts[:] = [[]]
    none = generate(model, tokens(1, PROMPT), max_new_tokens=40, use_mtp=True)
    all_right = Rows.add_draft

    good_drafts[:] = none.sequences.tolist()
    some = generate(model, tokens(1, PROMPT), max_new_tokens=40, use_mtp=True)
    assert all_right is Rows.add_draft
    assert none.drafted.sum() < none.rounds * 2
    assert some.rounds < none.rounds


def test_the_bound():
    for most in (0, 1, 2):
        output = generate(teacher(), **prompts(1), use_mtp=True, num_assistant_tokens=most)
        assert output.drafted.shape[1] == most
        assert len(output.acceptance) == most


# Rows in a cache.


def test_columns_and_layers_of_rows():
    layer = RowLayer(room=8)
    layer.columns = Columns([0, 0], 3, torch.device("cpu"))
    new = torch.arange(1.0, 7).view(2, 1, 3, 1)
    keys, values = layer.update(new, 10 * new)
    assert keys.flatten().tolist() == [1, 2, 3, 4, 5, 6]
    layer.columns = Columns([1, 3], 2, torch.device("cpu"))
    keys, values = layer.update(-new[:, :, :2], new[:, :, :2])
    assert keys[:, 0, :, 0].tolist() == [[1, -1, -2, 0, 0], [4, 5, 6, -4, -5]]
    assert values[:, 0, :, 0].tolist() == [[10, 1, 2, 0, 0], [40, 50, 60, 4, 5]]
    mask = layer.columns.mask(torch.tensor([[False] + [True] * 7, [True] * 8]), 5, torch.float32)
    seen = (mask == 0).squeeze(1).int().tolist()
    assert seen == [[[0, 1, 0, 0, 0], [0, 1, 1, 0, 0]], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]


def test_keep_greedy():
    scores = torch.nn.functional.one_hot(torch.tensor([[3, 1, 2], [3, 1, 2], [0, 1, 2]]), 4).float()
    kept, best = keep_greedy(scores, torch.tensor([[3, 1], [3, 0], [3, 1]]))
    assert kept.tolist() == [2, 1, 0]
    assert best.tolist() == [[3, 1, 2], [3, 1, 2], [0, 1, 2]]


# What cannot be.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"guidance_scale": 2.0}, "classifier-free guidance"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"use_cache": False}, "needs a cache"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"num_assistant_tokens": -1}, "0 or more; got -1"),
        ({"num_assistant_tokens": None}, "0 or more; got None"),
        ({"assistant_model": 0}, "assistant_model"),
        ({"past_key_values": "quanto"}, "QuantoQuantizedLayer"),
        ({"past_key_values": "fp8"}, "Fp8QuantizedLayer"),
    ],
)
def test_what_cannot_be_lossless_raises(options, message, monkeypatch):
    if "assistant_model" in options:
        options = {"assistant_model": tiny(2)}
    if "past_key_values" in options:
        options = {"past_key_values": new_cache(options["past_key_values"], tiny().config, monkeypatch)}
    with pytest.raises(ValueError, match=message):
        generate(tiny(), tokens(1, PROMPT), use_mtp=True, **options)


def test_inputs_prepared_by_others_raise(monkeypatch):
    """PEFT's prompt tuning puts its own method on the model, and its tokens would be left out."""
    model = tiny()
    monkeypatch.setattr(model, "prepare_inputs_for_generation", lambda *args, **kwargs: None, raising=False)
    with pytest.raises(ValueError, match="prompt tuning"):
        generate(model, tokens(1, PROMPT), use_mtp=True)


def test_a_model_without_modules_raises():
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        generate(tiny(0), tokens(1, PROMPT), use_mtp=True)


def test_a_prompt_that_is_in_the_cache_raises():
    model, cache = tiny(), DynamicCache(config=tiny().config)
    with torch.no_grad():
        model(tokens(1, MAX_LENGTH), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="crop it by one"):
        generate(model, tokens(1, MAX_LENGTH), past_key_values=cache, use_mtp=True)
