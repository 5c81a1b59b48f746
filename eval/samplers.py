"""What a sampler is asked, and what it must do: `Request` in, `Completion` out.

`local_sampler.TransformersSampler` holds a model in this process, `endpoint_sampler.EndpointSampler` asks any number of
OpenAI-compatible servers. Those two files alone touch torch and the network; this one is what their callers import.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from eval.sample import Completion
from eval.thinking import OPEN

Message = Mapping[str, str]
"""One turn of a chat: `role` and `content`."""


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample, or (`choices`) continuations to score.

    `prompt` is rendered text, or the messages of a chat for an endpoint that renders them itself: what
    `Sampler.render` returned. Everything that the sample depends on is here and in `Sampler.identity`: the same request
    gives the same sample whatever batch, order or run it is in. `temperature` 0 is greedy, and `top_p` and `seed` then
    say nothing. With `choices`, nothing is generated: the completion holds the log-probability of each as a
    continuation of the prompt, and only `prompt` and `choices` count. `tag` is the caller's own: never sent, not
    compared.
    """

    prompt: str | tuple[Message, ...]
    seed: int = 0
    max_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    tag: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.choices and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: a completion needs a budget of at least one token")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]; 1 keeps every token")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which would end every completion before its first token")


class Sampler(Protocol):
    """A model that can be asked. `eval.runner` and the teachers of `distill` know nothing else of it."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a stored sample depends on besides its request: model, revision or hash of the weights, dtype,
        tokenizer, chat template. JSON values. Batch size, device, concurrency and addresses are not in it."""
        ...

    @property
    def context_length(self) -> int | None:
        """The most tokens that prompt and completion may have together; None where it is not known."""
        ...

    def render(self, messages: Sequence[Message], *, open_thought: bool) -> str | tuple[Message, ...]:
        """The prompt of a chat. `open_thought` asks that the reply begin inside `<think>`."""
        ...

    def check(self, requests: Iterable[Request]) -> None:
        """ValueError for the first request whose prompt and budget exceed the context, before any token is made."""
        ...

    def sample(self, requests: Iterable[Request | None]) -> Iterator[tuple[Request, Completion]]:
        """Every request with its completion, in the order of completion. `requests` is read as the work goes on, never
        all at once, and a request that fails is a completion with `finish_reason` "failed". Where the next request
        depends on completions that are still to come, `requests` may give None: it is asked again after the next one.
        """
        ...


def render_chat(
    tokenizer: Any, messages: Sequence[Message], open_thought: bool, chat_template_kwargs: Mapping[str, Any]
) -> str:
    """A chat as text, by the tokenizer's template; ValueError where it has none."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template, and the protocol asks in turns of a "
            "chat; set tokenizer.chat_template, or take a protocol for base models (deepseek-v3-base)"
        )
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **chat_template_kwargs
    )
    if open_thought and not text.endswith(OPEN + "\n"):
        text += "\n" if text.endswith(OPEN) else OPEN + "\n"
    return text
