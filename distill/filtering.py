"""Which verified traces are fit to learn from, as R1 filtered its own: each filter a small function of values.

The report (v1 2.3.3) names mixed languages, long paragraphs and code blocks, and gives no threshold: the numbers are
our choice, those of the recipe in `recipe.Filter`, the rest here. `languages.py` holds the first of the three,
`loops.py` the search for repetition. A filter answers with what it found, in words, or "".
"""

import re
from collections.abc import Iterator

from distill.languages import mixed_languages
from distill.loops import find_loop
from distill.recipe import Filter
from distill.records import Decision, Problem, Trace

WRAPPED = range(60, 132)  # characters of a line that was broken at a width, not at the end of a paragraph

_TAG = re.compile(r"<\s*(/?)\s*think\s*>", re.IGNORECASE)
_FENCE = re.compile(r"```|^[ \t>]*~~~|\\begin\{(?:verbatim|lstlisting|minted)\}|<pre\b", re.MULTILINE)
_BLANK = re.compile(r"\n[ \t]*\n")


def decide(trace: Trace, problem: Problem, settings: Filter, raw_text: str | None = None) -> Decision:
    """The first filter that drops the trace, or none.

    `raw_text` is the completion as it came, tags and all, where it is at hand. Raises ValueError where the recipe
    limits tokens and the trace has no count of them.
    """
    for reason, found in judgements(trace, problem, settings, raw_text):
        if found:
            return Decision(trace.id, reason, found)
    return Decision(trace.id)


def judgements(trace: Trace, problem: Problem, settings: Filter, raw_text: str | None) -> Iterator[tuple[str, str]]:
    """(reason, what was found) of each filter that is on: whether the sample is whole, then its length, then how it
    reads, what costs most last."""
    yield "cut", cut(trace)
    yield "doubled_tags", doubled_tags(trace, raw_text)
    yield "empty_thought", empty_thought(trace, problem)
    yield "empty_answer", "" if trace.response.strip() else "nothing follows the thought"
    yield "too_short", too_short(trace, settings.min_tokens)
    yield "too_long", too_long(trace, settings.max_tokens)
    if settings.code_blocks and problem.kind not in settings.code_block_kinds_allowed:
        yield "code_block", code_block(trace.thought)
    yield "long_paragraph", long_paragraph(trace.thought, settings.paragraph_characters)
    if settings.repetition:
        yield "repetition", find_loop(trace.thought) or find_loop(trace.response)
    if settings.mixed_languages:
        shown = "\n".join((problem.question, *problem.choices, problem.answer))
        yield "mixed_languages", mixed_languages(trace.thought, shown)


def cut(trace: Trace) -> str:
    """The budget ended it, or the thought was never closed."""
    if trace.finish_reason != "stop":
        return f"it finished by {trace.finish_reason}"
    return "the thought is not closed" if trace.state == "truncated" else ""


def doubled_tags(trace: Trace, raw_text: str | None) -> str:
    """A second thought, or a tag as text: the student would learn to open a thought that nothing closes."""
    if trace.state == "nested":
        return "a tag stands more than once"
    for where, text in (("thought", trace.thought), ("answer", trace.response)):
        if tag := _TAG.search(text):
            return f"{tag[0]} stands in the {where}"
    closings = [tag[1] for tag in _TAG.finditer(raw_text or "")]
    if closings.count("") > 1 or closings.count("/") > 1:
        return "a tag stands more than once"
    return ""


def empty_thought(trace: Trace, problem: Problem) -> str:
    """Nothing was thought. Without tags at all that is no fault where nothing is verified: R1's data has answers
    without a thought to simple queries."""
    if trace.thought.strip() or (trace.state == "absent" and problem.kind == "none"):
        return ""
    return "there is no thought" if trace.state == "absent" else "there is nothing between the tags"


def too_short(trace: Trace, min_tokens: int | None) -> str:
    if min_tokens is None or (tokens := _tokens(trace, "min_tokens")) >= min_tokens:
        return ""
    return f"{tokens:,} tokens, of at least {min_tokens:,}"


def too_long(trace: Trace, max_tokens: int | None) -> str:
    if max_tokens is None or (tokens := _tokens(trace, "max_tokens")) <= max_tokens:
        return ""
    return f"{tokens:,} tokens, of at most {max_tokens:,}"


def _tokens(trace: Trace, field: str) -> int:
    if trace.completion_tokens is None:
        raise ValueError(
            f"filter.{field} needs a count of tokens, and {trace.id} has none: its endpoint reports no usage. Set "
            f"filter.{field}: null, or use an endpoint that reports it"
        )
    return trace.completion_tokens


def code_block(thought: str) -> str:
    """A fenced block, closed or not. `code` within a line is none."""
    if fence := _FENCE.search(thought):
        return thought[fence.start() :].strip().partition("\n")[0][:80]
    return ""


def long_paragraph(thought: str, characters: int | None) -> str:
    """A paragraph of more characters than `characters`."""
    longest = max(paragraphs(thought), key=len, default="")
    if characters is None or len(longest) <= characters:
        return ""
    return f"{len(longest):,} characters, of at most {characters:,}: {longest[:60]}..."


def paragraphs(text: str) -> list[str]:
    """What stands between line breaks: models break a line where a paragraph, a step or an item ends. A block whose
    lines are all broken at a width is one paragraph.

    >>> paragraphs("So x = 4.\\nThen y = 5.")
    ['So x = 4.', 'Then y = 5.']
    """
    found: list[str] = []
    for block in _BLANK.split(text):
        lines = block.strip().split("\n")
        wrapped = len(lines) > 2 and all(len(line) in WRAPPED for line in lines[:-1])
        found += [block.strip()] if wrapped else lines
    return found
