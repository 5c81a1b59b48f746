"""What a student reads and writes is what inference asks and what the row says; what is not is refused."""

# ruff: noqa: RUF001  # the wide bars of DeepSeek's tokens are meant

import json
from dataclasses import replace

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from distill.chat import MASKED, Encoded, Given, control_tokens, encode, example, is_teachable, prove
from eval.local_sampler import TransformersSampler
from eval.samplers import render_chat
from eval.thinking import split_thought
from tests.distill.training import FAMILIES, family_tokenizer, row
from tests.eval.models import tiny_lm

TURNS = ({"role": "user", "content": "What is 2 + 3?"},)
GIVEN = Given("a/0", TURNS, "2 and 3 make 5.\nYes.", "It is \\boxed{5}.")
# What stands after the question, as each family's published template begins a reply; `eval` opens the thought.
BEGINS = {
    "r1-distill": "<｜Assistant｜><think>\n",
    "ours": "<｜Assistant｜><think>\n",
    "qwen3": "<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "llama3": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n<think>\n",
    "chatml": "<|im_end|>\n<|im_start|>assistant\n<think>\n",
}


def encoded(tokenizer, given: Given = GIVEN) -> Encoded:
    return encode(tokenizer, [example(tokenizer, given.turns, given.thought, given.response)])[0]


def proof(tokenizer, given: Given = GIVEN, tokens: Encoded | None = None):
    return prove(tokenizer, [given], [tokens or encoded(tokenizer, given)], [tokenizer.eos_token_id])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learnt_is_thought_answer_and_end(family):
    tokenizer = family_tokenizer(family)
    tokens = encoded(tokenizer)
    learnt = [label for label in tokens.labels if label != MASKED]
    assert tokenizer.decode(learnt) == ("2 and 3 make 5.\nYes.\n</think>\n\nIt is \\boxed{5}." + FAMILIES[family][1][1])
    read = tokenizer.decode(tokens.input_ids[: -len(learnt)])
    assert read.endswith("What is 2 + 3?" + BEGINS[family])
    assert tokens.labels[: -len(learnt)] == [MASKED] * (len(tokens.labels) - len(learnt))
    assert proof(tokenizer).shown == f"⟦{read}⟧" + tokenizer.decode(learnt)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_inference_asks(family):
    """By `eval`'s own sampler, and what it would read back is split into the row's thought and answer."""
    tokenizer = family_tokenizer(family)
    sampler = TransformersSampler(tiny_lm(), tokenizer)
    prompt = sampler.render(TURNS, open_thought=True)
    tokens = encoded(tokenizer)
    learnt = [label for label in tokens.labels if label != MASKED]
    assert tokens.input_ids == sampler.encode(prompt) + learnt
    bos = tokenizer.bos_token_id
    assert tokens.input_ids.count(bos) == (bos is not None)

    thought = split_thought(tokenizer.decode(learnt[:-1]), opened=True)
    assert (thought.thought.strip(), thought.answer.strip()) == (GIVEN.thought, GIVEN.response)


def test_an_answer_alone_stands_behind_an_empty_thought():
    tokenizer = family_tokenizer("qwen3")
    one = example(tokenizer, TURNS, "", "\\boxed{5}")
    assert (
        one.prompt + one.completion
        == tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        + "\\boxed{5}"
    )  # as Qwen3 itself writes a reply without thinking
    given = replace(GIVEN, thought="", response="\\boxed{5}")
    assert proof(tokenizer, given).rows == 1


def test_tags_that_are_no_tokens_are_told_of():
    told = proof(family_tokenizer("llama3"))
    assert not told.tags_are_tokens
    assert "add_tokens" in told.notes[0]
    assert (proof(family_tokenizer("qwen3")).tags_are_tokens, proof(family_tokenizer("qwen3")).notes) == (True, ())


# TRL's defaults, beside.


def trl_tokens(family: str, example_row: dict, folder) -> Encoded:
    """What TRL would train on, by default."""
    trainer = SFTTrainer(
        tiny_lm("llama", vocabulary=512),
        args=SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([example_row]),
        processing_class=family_tokenizer(family),
    )
    first = trainer.train_dataset[0]
    return Encoded(first["input_ids"], first["labels"])


REPLY = {"role": "assistant", "content": f"<think>\n{GIVEN.thought}\n</think>\n\n{GIVEN.response}"}
FORMS = {
    "messages": {"messages": [*TURNS, REPLY]},
    "prompt and completion": {"prompt": list(TURNS), "completion": [REPLY]},
    "reasoning_content": {
        "messages": [
            *TURNS,
            {"role": "assistant", "content": GIVEN.response, "reasoning_content": GIVEN.thought},
        ]
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trl_by_default_teaches_something_else(family, form, tmp_path):
    """R1's templates delete the thought, others do where it comes apart; of `messages` the prompt is learnt too. What
    is left learns to open the thought, which inference has opened already, or a line break after the end."""
    tokenizer, tokens = family_tokenizer(family), trl_tokens(family, FORMS[form], tmp_path)
    learnt = tokenizer.decode([label for label in tokens.labels if label != MASKED])
    lost = family in ("r1-distill", "ours") or (form == "reasoning_content" and family != "qwen3")
    assert (GIVEN.thought not in learnt) is lost
    assert ("What is 2 + 3?" in learnt) is (form != "prompt and completion")
    with pytest.raises(ValueError, match="row a/0 would be taught wrong"):
        proof(tokenizer, tokens=tokens)
    assert proof(tokenizer).rows == 1  # ours


# Refusals.


def test_each_fault_is_found_and_named():
    tokenizer = family_tokenizer("ours")
    good = encoded(tokenizer)
    ids, labels = good.input_ids, good.labels
    start = labels.count(MASKED)
    end = tokenizer.eos_token_id
    cut = len(ids) - 10
    faults = {
        "'<｜end▁of▁sentence｜>' is not its last label": Encoded(ids[:-1], labels[:-1]),
        "its answer 'It is .* is not in the labels": Encoded([*ids[:cut], end], [*labels[:cut], end]),
        "not the tokens of its end": Encoded(ids, [*labels[: start + 3], MASKED, *labels[start + 4 :]]),
        "inference asks": Encoded(ids, [*labels[: start - 1], ids[start - 1], *labels[start:]]),
        "it would be read as '<｜begin▁of▁sentence｜><｜begin": Encoded([ids[0], *ids], [MASKED, *labels]),
    }
    for name, tokens in faults.items():
        with pytest.raises(ValueError, match=rf"(?s)row a/0 would be taught wrong: .*{name}"):
            proof(tokenizer, tokens=tokens)
    lost = encoded(tokenizer, replace(GIVEN, thought=""))
    with pytest.raises(ValueError, match="its thought '2 and 3 make 5"):
        proof(tokenizer, tokens=lost)
    with pytest.raises(ValueError, match="more than its thought and its answer"):
        proof(tokenizer, replace(GIVEN, thought="2 and 3"), encoded(tokenizer))


def test_two_beginnings_are_refused():
    """A template that writes BOS behind a space: the tokenizer adds another, at inference as in training."""
    tokenizer = family_tokenizer("ours")
    tokenizer.chat_template = "{{ ' ' }}" + tokenizer.chat_template
    with pytest.raises(ValueError, match=r"'<｜begin▁of▁sentence｜>' stands in it 2 times"):
        proof(tokenizer)


def test_an_end_that_does_not_stop_generation_is_refused():
    tokenizer = family_tokenizer("qwen3")
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    with pytest.raises(
        ValueError, match=r"'<\|im_end\|>' \(0\), and its generation stops at \[2\].*config.eos_token_id"
    ):
        prove(tokenizer, [GIVEN], [encoded(tokenizer)], [other])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        encoded(tokenizer)


def test_templates_that_hide_the_thought_or_the_question_are_refused():
    tokenizer = family_tokenizer("qwen3")
    published = tokenizer.chat_template
    # A template of a model that never thinks: it closes an empty thought itself.
    tokenizer.chat_template = published.replace("enable_thinking is defined and enable_thinking is false", "true")
    assert render_chat(tokenizer, TURNS, True, {}).endswith("</think>\n\n<think>\n")
    with pytest.raises(ValueError, match=r"begins the reply with .*outside its tags"):
        encoded(tokenizer)
    tokenizer.chat_template = "{{ 'Hello' }}"
    with pytest.raises(ValueError, match=r"leaves out the last turn, 'What is 2 \+ 3\?'"):
        encoded(tokenizer)


@pytest.mark.parametrize(
    ("changes", "fine"),
    [
        ({}, True),
        ({"thought": "a < b, and <b> is bold"}, True),
        ({"thought": "ChatML ends turns with <|im_end|> always."}, False),
        ({"response": "I would write </think> here."}, False),
        ({"thought": "as in <think>"}, False),
        ({"turns": ({"role": "user", "content": "What is <|im_start|>?"},)}, False),
    ],
)
def test_texts_that_hold_control_tokens_are_not_taught(changes, fine):
    tokenizer = family_tokenizer("qwen3")
    given = replace(GIVEN, **changes)
    assert is_teachable(given, encoded(tokenizer, given), control_tokens(tokenizer)) is fine


def test_a_batch_is_encoded_as_one_by_one():
    tokenizer = family_tokenizer("r1-distill")
    examples = [example(tokenizer, json.loads(one.messages), one.thought, one.response) for one in map(row, range(20))]
    assert encode(tokenizer, examples) == [encode(tokenizer, [one])[0] for one in examples]
    assert encode(tokenizer, []) == []
