"""What a sampler is asked, and what it must do: `Request` in, `Completion` out.

`local_sampler.TransformersSampler` holds a model in this process, `endpoint_sampler.EndpointSampler` asks any number of
OpenAI-compatible servers. Those two files alone touch torch and the network; this one is what their callers import.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from eval.sample import Completion

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

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        """Every request with its completion, in the order of completion. `requests` is read as the work goes on, never
        all at once, and a request that fails is a completion with `finish_reason` "failed"."""
        ...
