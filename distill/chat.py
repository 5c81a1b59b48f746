"""What a student reads and what it learns to write: as text, as tokens, and proven before anything is trained.

    example(tokenizer, turns, thought, response)  ->  Example(prompt, completion)
    encode(tokenizer, examples)                   ->  Encoded(input_ids, labels), -100 on the prompt
    prove(tokenizer, rows, examples, encoded)     ->  Proof, or a ValueError that names the row

The prompt is rendered and tokenised as `eval` does it at inference, and the completion is tokenised apart, so that a
student meets in training the very tokens it will be asked with. No template sees the thought: those of reasoning models
delete it from every turn but the last, or from all, and training on rendered conversations then trains it away.
`labels.py` puts these rows on disk, `student.py` trains on them. No torch.
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.sample import Record
from eval.samplers import Message, render_chat
from eval.thinking import CLOSE, OPEN

MASKED = -100
"""The label of a token that is read and not learnt."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt that ends in an open thought, and what is written after it up to the end of sequence."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """`labels` are those of `input_ids` (not shifted): `MASKED` on the prompt, the token itself on the completion and
    on the end of sequence, which is last."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Given:
    """What a row of the dataset says, without any template; `thought` "" where the student learns answers alone."""

    id: str
    turns: tuple[Message, ...]
    thought: str
    response: str


@dataclass(frozen=True, slots=True)
class Proof(Record):
    """What was checked on `rows` rows before training. `shown` is the first of them as the model sees it, with what is
    read and not learnt in ⟦ ⟧; `notes` are for the user to know."""

    rows: int
    shown: str
    end_of_sequence: str
    beginning_of_sequence: str
    tags_are_tokens: bool
    notes: tuple[str, ...]


# Text.


def example(tokenizer: Any, turns: Sequence[Message], thought: str, response: str) -> Example:
    """The prompt as inference renders it, and `{thought}\\n</think>\\n\\n{response}`; an empty thought closes at once.

    ValueError where the template hides the question or closes the thought that it opens.
    """
    prompt = render_chat(tokenizer, turns, open_thought=True, chat_template_kwargs={})
    question = turns[-1]["content"].strip()
    at = prompt.rfind(question)
    if at == -1:
        raise ValueError(
            f"the chat template leaves out the last turn, {_short(question)!r}; give another chat_template"
        )
    after = prompt[at + len(question) :]
    if CLOSE in after or after.count(OPEN) != 1:
        raise ValueError(
            f"the chat template begins the reply with {after!r}, so the thought would stand outside its tags; give a "
            f"chat_template that ends in {OPEN} or before it"
        )
    return Example(prompt, f"{thought}\n{CLOSE}\n\n{response}")


# Tokens.


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens that `eval.local_sampler` feeds for a prompt: no second BOS where the template wrote the first."""
    bos = tokenizer.bos_token
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=not (bos and prompt.startswith(bos)), verbose=False)
    return ids


def encode(tokenizer: Any, examples: Sequence[Example]) -> list[Encoded]:
    """Prompt and completion tokenised apart, then the end of sequence; ValueError for a tokenizer without one."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no eos_token, so a student could not learn to stop; set one in its files")
    if not examples:
        return []
    completions = tokenizer([one.completion for one in examples], add_special_tokens=False, verbose=False)["input_ids"]
    encoded = []
    for one, completion in zip(examples, completions, strict=True):
        prompt = prompt_ids(tokenizer, one.prompt)
        learnt = [*completion, end]
        encoded.append(Encoded(prompt + learnt, [MASKED] * len(prompt) + learnt))
    return encoded


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that steer and stand for no text, without the tags of the thought, which some tokenizers call so."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = {number: tokenizer.convert_ids_to_tokens(number) for number in special | set(tokenizer.all_special_ids)}
    return {number: text for number, text in texts.items() if text not in (OPEN, CLOSE)}


def is_teachable(given: Given, encoded: Encoded, control: Mapping[int, str]) -> bool:
    """Whether question, thought and answer are text alone.

    Whoever writes about chat templates writes `<|im_end|>` or `</think>` out; a tokenizer makes the token itself of it,
    and the student would learn to end or to close in the middle.
    """
    if any(tag in text for tag in (OPEN, CLOSE) for text in (given.thought, given.response)):
        return False
    if any(text in turn["content"] for text in control.values() for turn in given.turns):
        return False
    return control.keys().isdisjoint(label for label in encoded.labels[:-1] if label != MASKED)


# Proof.


def prove(
    tokenizer: Any,
    rows: Sequence[Given],
    encoded: Sequence[Encoded],
    stop_ids: Iterable[int],
) -> Proof:
    """Decodes the labels of real rows and holds them against what the rows say.

    `stop_ids` are the tokens at which generation of the student will stop. ValueError, naming the row and the way out,
    unless thought, answer and end of sequence are learnt, nothing of the prompt is, the prompt's tokens are those of
    inference, and the beginning of sequence stands once.
    """
    for given, tokens in zip(rows, encoded, strict=True):
        if fault := _fault(tokenizer, given, tokens):
            raise ValueError(f"row {given.id} would be taught wrong: {fault}")
    end = tokenizer.eos_token_id
    if end not in set(stop_ids):
        raise ValueError(
            f"the student would learn to end with {tokenizer.eos_token!r} ({end}), and its generation stops at "
            f"{sorted(stop_ids)}: it would never stop. Take the model's own tokenizer, or set the student's "
            f"config.eos_token_id to [{end}, ...], which goes into its generation config too"
        )
    tags = all(len(tokenizer.encode(tag, add_special_tokens=False)) == 1 for tag in (OPEN, CLOSE))
    notes = []
    if not tags:
        notes.append(
            f"{OPEN} and {CLOSE} are no tokens of this tokenizer and are learnt as text; add_tokens makes them tokens"
        )
    bos = tokenizer.bos_token
    first = encoded[0].input_ids[0] if encoded else None
    return Proof(
        rows=len(rows),
        shown=shown(tokenizer, encoded[0]) if encoded else "",
        end_of_sequence=tokenizer.eos_token,
        beginning_of_sequence=bos if bos and first == tokenizer.bos_token_id else "",
        tags_are_tokens=tags,
        notes=tuple(notes),
    )


def _fault(tokenizer: Any, given: Given, tokens: Encoded) -> str:
    """What is wrong with the labels of a row, "" for nothing. It knows nothing of how they were made."""
    ids, labels = tokens.input_ids, tokens.labels
    learnt = [label for label in labels if label != MASKED]
    start = len(labels) - len(learnt)
    if len(ids) != len(labels) or labels[:start] != [MASKED] * start or labels[start:] != ids[start:]:
        return "its labels are not the tokens of its end, one for one"
    prompt = render_chat(tokenizer, given.turns, open_thought=True, chat_template_kwargs={})
    if ids[:start] != prompt_ids(tokenizer, prompt):
        return (
            f"it would be read as {tokenizer.decode(ids[:start])!r}, and inference asks {prompt!r}; the chat template "
            "must render one conversation in one way"
        )
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins = ids[:-1].count(bos) if bos is not None else 0
    if begins > 1:
        return (
            f"{tokenizer.bos_token!r} stands in it {begins} times; a template that writes it and a tokenizer that adds "
            "it do that, or a question that holds it"
        )
    if not learnt or learnt[-1] != end or end in learnt[:-1]:
        return f"{tokenizer.eos_token!r} is not its last label, and that alone"
    text = tokenizer.decode(learnt[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for name, part in (("thought", given.thought), ("closing tag", CLOSE), ("answer", given.response)):
        if _letters(part) not in _letters(text):
            return f"its {name} {_short(part)!r} is not in the labels, which read {_short(text)!r}"
    if _letters(text) != _letters(given.thought + CLOSE + given.response):
        return f"the labels read {_short(text)!r}, which is more than its thought and its answer"
    return ""


def shown(tokenizer: Any, tokens: Encoded) -> str:
    """The tokens as text, what is read and not learnt in ⟦ ⟧."""
    start = next((at for at, label in enumerate(tokens.labels) if label != MASKED), len(tokens.labels))
    parts = [
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in (tokens.input_ids[:start], tokens.input_ids[start:])
    ]
    return f"⟦{parts[0]}⟧{parts[1]}"


def _letters(text: str) -> str:
    """Without spaces, and in one form of Unicode: tokenizers normalise, and some begin with a space of their own."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:50]}...{text[-25:]}"
