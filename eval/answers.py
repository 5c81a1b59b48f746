r"""The answer to a mathematics question: found in what a model wrote, and compared with the gold answer.

    response --split_thought--> answer text --extract_math--> short answer --same (exact.py), then a worker--> Graded

`extract_math` is pure and linear in the length of the text. `exact.py` decides most pairs in microseconds, in exact
arithmetic; the rest goes to math-verify's parser and sympy in processes that are killed at a time and memory limit
(`math_pool.py`, `math_worker.py`, `math_oracle.py`). Nothing here imports sympy, math-verify or torch.

No tolerance is applied: 0.333 is not 1/3. Numbers, units and forms that do count as equal are the table in
`tests/eval/test_answers.py`.
"""

# The signs of Chinese text and of typesetting are meant.
# ruff: noqa: RUF001

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from eval.exact import Undecided, clean, same
from eval.math_pool import KEPT, Failure, Timeout, pool
from eval.sample import Graded, Sample
from eval.thinking import before_next_question, split_thought

MATH_GRADER = "math/1"
TIME_LIMIT = 5.0  # seconds of wall time for one verdict
MEMORY_LIMIT = 512 << 20  # bytes that a worker may add to what it has
MAX_ANSWER = 10_000  # characters of an extracted answer that are graded

# ---------------------------------------------------------------------------------------------------------------------
# Extraction.


def extract_math(text: str) -> str | None:
    r"""The final answer in a text without thought, as it is written there; None where there is none.

    In this order, the text before a further "Question:", "Q:" or "Problem:" first, if an answer is stated there (1, 2):
    1. The last complete box (`\boxed{}`, `\fbox{}`; an empty one does not count; several in a row, with "," or "and"
       between them, are one answer), or the last value of the key "answer" in JSON, malformed JSON included: whichever
       stands later.
    2. The last marker: "#### 5", "The answer is 5", "Final answer: 5", "A: 5" on a line of its own, 答案是 5. If what
       follows says that there is no answer ("Answer: don't know"), there is none.
    3. JSON that was begun and holds no "answer" was cut off or broken: there is none.
    4. The last resort: the last number or formula in bold, between dollars or alone in the last lines.

    >>> extract_math(r"so \boxed{4}. No, wait: \boxed{\boxed{5}}")
    '5'
    >>> extract_math("The answer is $\\frac{1}{2}$. I hope it is correct.")
    '\\frac{1}{2}'
    >>> extract_math("Answer: don't know") is None
    True
    """
    first = before_next_question(text)
    found = _stated(first) if len(first) < len(text) else _NOTHING
    if found is _NOTHING or (isinstance(found, str) and not re.search(r"[\d\\]", found)):  # "I will answer: in steps"
        found = _stated(text)
    if found is not _NOTHING:
        return found if isinstance(found, str) else None
    if _OPEN_JSON.match(text.lstrip()[:200]):
        return None
    return _last_resort(text)


def _stated(text: str) -> object:
    """The answer in a box, in JSON or behind a marker; None where that says there is none; else _NOTHING."""
    boxed, box_end = _last_boxes(text)
    value, value_end = _last_json_answer(text)
    if boxed is not None and box_end > value_end:
        return boxed
    if value is not None:
        inner = extract_math(value) if _MARKED.search(value[:1000]) else None
        return inner or _candidate(value)
    return boxed if boxed is not None else _last_marked(text)


_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*(\{)?")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE_BOX_END = re.compile(r"\$|\n|\\\)|\\\]|[.,;](?:\s|$)")


# Between two boxes of one answer: \boxed{3} and \boxed{4}; $x = \boxed{3}$, $x = \boxed{4}$.
_NEXT_BOX = re.compile(
    r"\}\s*(?:\$|\\\))?\s*(?:,?\s*(?:and|or|\\text\s*\{\s*(?:and|or)\s*\})|,)\s*(?:\$|\\\()?\s*"
    r"(?:[a-zA-Z](?:_\{?\w\}?)?\s*=\s*)?$"
)


def _last_boxes(text: str) -> tuple[str | None, int]:
    """The content of the last complete box and of those before it in the same list, and where it ends."""
    content, end, start = _last_box(text)
    contents = [content]
    for _ in range(20):
        gap = _NEXT_BOX.search(text, max(0, start - 60), start) if start > 0 else None
        if gap is None:
            break
        content, before_end, start = _last_box(text[: gap.start() + 1])
        if content is None or before_end != gap.start() + 1:
            break
        contents.insert(0, content)
    return (", ".join(dict.fromkeys(map(str, contents))) if len(contents) > 1 else contents[0]), end


def _last_box(text: str) -> tuple[str | None, int, int]:
    """The content of the last complete box, where it ends and where it begins. Of nested boxes, the inner one.

    Behind 2,000 boxes without content, only what stands before a closing brace is looked at, 2,000 more of them.
    """
    end = len(text)
    for position in _box_positions(text):
        # \boxed, \fbox or \framebox
        match = (
            _BOX.match(text, max(0, position - 1))
            or _BOX.match(text, max(0, position - 2))
            or _BOX.match(text, max(0, position - 6))
        )
        if match is None:
            continue
        if match[1] and text.find("}", match.end(), end) == -1:
            pass
        elif match[1]:
            depth = 1
            for brace in _BRACE.finditer(text, match.end(), max(end, match.end())):
                depth += {"{": 1, "}": -1}.get(brace[0], 0)
                if depth == 0:
                    content = text[match.end() : brace.start()].strip()
                    if content:
                        return _without_braces(content), brace.end(), match.start()
                    break
        else:  # \boxed 5
            limit = max(match.end(), min(end, match.end() + 200))
            stop = _BARE_BOX_END.search(text, match.end(), limit)
            bare_end = stop.start() if stop else limit
            if content := text[match.end() : bare_end].strip():
                return content, bare_end, match.start()
        # A box left open leaves open what it stands in: an earlier one can only be complete before it. So nothing is
        # read twice.
        end = match.start()
    return None, -1, -1


def _without_braces(text: str) -> str:
    """{{5}} -> 5. Linear: the two ends are counted, not peeled."""
    opening = len(text) - len(text.lstrip("{ "))
    closing = len(text) - len(text.rstrip("} "))
    if not opening or not closing:
        return text
    depth, lowest = 0, None
    for match in re.finditer(r"\\.|[{}]", text[opening : len(text) - closing]):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        lowest = depth if lowest is None else min(lowest, depth)
    if depth != 0 or (lowest or 0) < 0 or text[: len(text) - closing].endswith("\\"):
        return text
    inner = text[opening : len(text) - closing]
    return inner.strip() if text[:opening].count("{") == text[len(text) - closing :].count("}") else text


_JSON_KEY = re.compile(r"""["'*](?:final[_ ])?answer["']\s*:\s*""", re.IGNORECASE)
_JSON_STRING = re.compile(r'"([^"\\]*+(?:\\.[^"\\]*+)*+)"', re.DOTALL)
_JSON_BARE = re.compile(r"[^,}\n]*")
_JSON_LIST = re.compile(r"\[([^\[\]\n]*)\]")
_OPEN_JSON = re.compile(r"""\s*(?:```(?:json)?\s*)?\{\s*["']\w+["']\s*:""")


def _last_json_answer(text: str) -> tuple[str | None, int]:
    """The value of the last "answer" key: a string, number or list, quoted or not, and where it ends."""
    for position in _last_positions(text, "nswer"):
        # Before it: a quote and "a", or a quote and "final_a".
        key = _JSON_KEY.match(text, max(0, position - 2)) or _JSON_KEY.match(text, max(0, position - 8))
        if key is not None:
            break
    else:
        return None, -1
    start = key.end()
    if match := _JSON_STRING.match(text, start):
        return _unescape(match[1]).strip(), match.end()
    if match := _JSON_LIST.match(text, start):
        return ", ".join(part.strip().strip("\"'") for part in match[1].split(",")), match.end()
    match = _JSON_BARE.match(text, start)
    assert match is not None
    if match.end() == len(text) and match[0].startswith('"'):
        return None, -1  # cut off: "12 may have been going to be "123"
    bare = match[0].strip().strip("\"'`*").strip()
    return (None, -1) if bare in ("", "null", "None") else (_unescape(bare), match.end())


def _unescape(value: str) -> str:
    r"""JSON's escapes undone, LaTeX kept: models write both "\\frac{1}{2}" and "\frac{1}{2}"."""

    return re.sub(r'\\(["/\\]|[nt](?![a-zA-Z]))', lambda match: " " if match[1] in "nt" else match[1], value)


_MARKED = re.compile(
    r"""\#\#\#\#
    |answer(?:\s{1,3}(?:to|for|of|in)\s{1,3}[^.:\n]{0,80}?)?
        (?:[*_]{0,3}\s{1,3}(?:is|are|would\ be|will\ be|must\ be|should\ be|equals|comes\ out\ to\ be)\b\s{0,3}:?
           |[*_]{0,3}\s{0,3}[:：=])
    |\n?[*_]{0,2}A[*_]{0,2}[ \t]{0,3}[:：]
    |答案\s{0,3}(?:是|为|[:：])\s{0,3}[:：]?""",
    re.IGNORECASE | re.VERBOSE,
)
# Where a marker may begin, and how far behind that the literal stands.
_LITERALS = (("nswer", 1), ("NSWER", 1), ("####", 0), ("答案", 0), ("\nA:", 0), ("\nA：", 0), ("\n**A", 0))


def _last_positions(text: str, literal: str, most: int = 200) -> Iterator[int]:
    """Where a literal stands, from the end: what a regex over the whole text finds, a hundred times faster."""
    position = len(text)
    while most and (position := text.rfind(literal, 0, position)) != -1:
        yield position
        most -= 1


def _box_positions(text: str) -> Iterator[int]:
    last = len(text)
    for position in _last_positions(text, "box", most=2000):
        yield position
        last = position
    yield from _last_positions(text[: text.rfind("}", 0, last) + 1], "box", most=2000)


_NOTHING = object()
_NO_ANSWER = re.compile(
    r"""(?:(?:i\s+)?(?:do\s+not|don['’]?t|cannot|can['’]?t|could\s+not|couldn['’]?t)\b|not\b|un(?:known|clear|defined\s+here)
    |none\s+of\s+(?:the|these)\b|n/?a\b|impossible\s+to\b|no\s+(?:answer|idea)\b|i['’]m\s+not\b|___|\?|不知道|无法|null\b|\[?insert)""",
    re.IGNORECASE | re.VERBOSE,
)


def _last_marked(text: str) -> object:
    """What follows the last marker that something follows; None where that says there is no answer; else _NOTHING."""
    starts = {p - back for literal, back in _LITERALS for p in _last_positions(text, literal) if p >= back}
    if text.startswith(("A:", "**A")):
        starts.add(0)
    for start in sorted(starts, reverse=True):
        match = _MARKED.match(text, start)
        if match is None:
            continue
        answer = _after_marker(text[match.end() : match.end() + 2000])
        if answer.strip("$*_ "):
            return None if _NO_ANSWER.match(answer.strip("*_ $\"'")) else _candidate(answer)
    return _NOTHING


_ENVIRONMENT = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$((?:[^$\n\\]|\\.)+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_SENTENCE_END = re.compile(
    r"[.。](?=\s|$|\*\*|</)|(?<![\d\\])[!?](?=\s|$)|\n|<\|?/?[a-z_]+\|?>|\s(?:I hope|because|since|which is)\b", re.I
)


_ADVERBS = re.compile(
    r"(?:(?:therefore|thus|hence|then|simply|just|indeed|clearly|actually|now|equal to)\b[,:]? ?){1,3}", re.IGNORECASE
)


def _after_marker(text: str) -> str:
    """The rest of the line, or of the next line that is not empty, without markup around it."""
    text = _ADVERBS.sub("", text.lstrip(" \t\n*_:：`>")).replace("\\boxed{}", "")
    if _MARKED.match(
        re.sub(r"^(?:(?:so|therefore|thus|the|final|correct),?\s+)*", "", text[:100], flags=re.IGNORECASE)
    ):
        return ""  # a marker of its own
    match = _ENVIRONMENT.match(text)
    if match:
        inner = next(group for group in match.groups() if group is not None)
        rest = _SENTENCE_END.split(text[match.end() :], maxsplit=1)[0]
        # "$5$ and $7$", "$x = 1$, $x = 2$": the sentence goes on with more of it.
        if re.match(r"\s*(?:,|and\b|or\b|\\?%|[-+*/^=<>]|\\)", rest) and ("$" in rest or "\\(" in rest):
            return (text[: match.end()] + rest).strip()
        unit = re.match(r"\s*(\\?%|[a-zA-Z]+(?:\s+(?:per|of)\s+[a-zA-Z]+)?)\s*$", rest)
        return (inner + " " + unit[1]).strip() if unit and re.search(r"\d\s*$", inner) else inner.strip()
    return _SENTENCE_END.split(text, maxsplit=1)[0].strip().strip("*_`").strip()


_ANY_NUMBER = re.compile(
    r"(?<![\w.\\])(?:[$€£]\s*)?[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?(?:\s*%)?(?![\w/])|(?<!\d)[-−]?\.\d+"
)
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}\s+[A-Za-z]{2,}")
_WORDS = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
_RESULT = re.compile(r"\$?\s?-?[\d,]*\.?\d+(?:\s+[a-z]+){0,3}")
_HEDGED = re.compile(
    r"\b(?:not|less|fewer|greater|least|most|between|over|under|million|billion|thousand|dozen|hundred|or|cannot|no)\b",
    re.I,
)


_TWO_EQUATIONS = re.compile(r"\b[a-zA-Z]\s?=[^=]*(?:,|\b(?:and|or)\b)\s?[a-zA-Z]\s?=")


def _candidate(text: str) -> str | None:
    """What was captured, or the one number in it if it is a sentence around a number ("She has 18 eggs left")."""
    text = text.strip().strip("*_`").strip()
    if len(text) > 2000:
        return text
    if boxed := _last_boxes(text)[0]:
        return boxed
    if not text or _NO_ANSWER.match(text.strip("\"' $")):
        return None
    if _PROSE.search(text) and not _HEDGED.search(text):
        environments = [next(g for g in m.groups() if g is not None) for m in _ENVIRONMENT.finditer(text)]
        if len(environments) == 1 and not _ANY_NUMBER.search(_ENVIRONMENT.sub("", text)):
            return environments[0].strip()
        numbers = [match[0] for match in _ANY_NUMBER.finditer(text)]
        if len(numbers) == 1:
            return numbers[0].strip()
    if "=" in text and _WORDS.search(text) and not _TWO_EQUATIONS.search(text):
        last = text.rpartition("=")[2].strip()
        if _RESULT.fullmatch(last):
            return last
    return text


def _last_resort(text: str) -> str | None:
    """All of a short line without sentences; else the last number or formula of the last 2,000 characters."""
    line = text.strip()
    if len(line) < 200 and "\n" not in line and not _PROSE.search(line) and not _ENVIRONMENT.search(line):
        return _candidate(line)
    tail = text[-2000:]
    best, position = None, -1
    for match in _ENVIRONMENT.finditer(tail):
        inner = next(group for group in match.groups() if group is not None).strip()
        if inner and match.end() > position:
            best, position = inner, match.end()
    for match in _ANY_NUMBER.finditer(tail):
        if match.end() > position:
            best, position = match[0], match.end()
    return best.strip() if best else None


# ---------------------------------------------------------------------------------------------------------------------
# Grading.


def grade_math(response: str, gold: str, *, time_limit: float = TIME_LIMIT, memory_limit: int = MEMORY_LIMIT) -> Graded:
    """Judges what a model wrote. A thought that was never closed is `truncated`, whatever stands in it.

    Safe for any input, from any thread, and back within `time_limit` seconds + 0.5: a verdict that takes longer is
    `timeout`, one that needs more than `memory_limit` bytes or kills its worker is `failed`, neither is `wrong`.
    """
    thought = split_thought(response)
    if thought.state == "truncated":
        return Graded("truncated", detail="the thought was not closed", grader=MATH_GRADER)
    return grade_final(thought.answer, gold, time_limit=time_limit, memory_limit=memory_limit)


def grade_final(
    answer_text: str, gold: str, *, time_limit: float = TIME_LIMIT, memory_limit: int = MEMORY_LIMIT
) -> Graded:
    """`grade_math` for a caller that has split off the thought already."""
    answer = extract_math(answer_text)
    if answer is None:
        return Graded("no_answer", detail="no answer was found", grader=MATH_GRADER)
    return equivalent(answer, _published(gold), time_limit=time_limit, memory_limit=memory_limit)


def grade_sample(sample: Sample, answer: str, chain: str) -> Graded:
    """`grade_final` as a benchmark of mathematics uses it; there is one chain."""
    return grade_final(answer, sample.gold)


def _published(gold: str) -> str:
    """The answer in a gold text: some sets publish the whole solution, with the answer behind "####" or in a box."""
    if "#" in gold:
        return gold.rpartition("#")[2].strip()
    return (extract_math(gold) or gold) if "\\boxed" in gold else gold


def equivalent(answer: str, gold: str, *, time_limit: float = TIME_LIMIT, memory_limit: int = MEMORY_LIMIT) -> Graded:
    """Whether an extracted answer means what the gold means.

    >>> equivalent("0.5", r"\\frac{1}{2}").verdict
    'correct'
    """
    if not answer.strip():
        return Graded("no_answer", detail="the answer is empty", grader=MATH_GRADER)
    if len(answer) > MAX_ANSWER or len(gold) > MAX_ANSWER:
        return _long(answer, gold)
    shown = answer

    def graded(verdict, detail: str = "") -> Graded:
        return Graded(verdict, answer=shown, detail=detail, grader=MATH_GRADER)

    try:
        return graded("correct" if same(gold, answer) else "wrong", "exact")
    except Undecided:
        pass
    try:
        reply = pool().call({"gold": gold, "answer": answer, "memory": memory_limit}, time_limit)
    except Timeout as reason:
        return graded("timeout", str(reason))
    except Failure as reason:
        return graded("failed", str(reason))
    if "error" in reply:
        return graded("failed", f"the worker gave up: {reply['error']}")
    return graded("correct" if reply["equal"] else "wrong", reply.get("detail", "sympy"))


def _long(answer: str, gold: str) -> Graded:
    """An answer too long to be read: equal as text or as digits, different as digits, or not judged."""
    shown = answer[:200] + " ..."
    first, second = answer.strip(), gold.strip()
    if first == second:
        return Graded("correct", shown, "equal as text", MATH_GRADER)
    if all(text.isascii() and text.isdigit() for text in (first, second)):
        return Graded("correct" if first.lstrip("0") == second.lstrip("0") else "wrong", shown, "exact", MATH_GRADER)
    detail = f"an answer of {len(answer)} characters is not read; the limit is {MAX_ANSWER}"
    return Graded("failed", shown, detail, MATH_GRADER)


def grade_math_many(
    pairs: Iterable[tuple[str, str]],
    *,
    time_limit: float = TIME_LIMIT,
    memory_limit: int = MEMORY_LIMIT,
    workers: int | None = None,
) -> list[Graded]:
    """`grade_math` of each (response, gold), in order. The time limit is each pair's own, from when its turn comes."""
    pairs = list(pairs)
    with ThreadPoolExecutor(workers or KEPT, thread_name_prefix="grade_math") as threads:
        return list(
            threads.map(lambda p: grade_math(*p, time_limit=time_limit, memory_limit=memory_limit), pairs)
        )  # fmt: skip


def answer_classes(
    answers: Sequence[str | None], *, time_limit: float = TIME_LIMIT, memory_limit: int = MEMORY_LIMIT
) -> list[int | None]:
    """The class of each answer, for votes: equal answers have the same number, None has None.

    Classes are numbered as they first occur, and each answer is compared with the first of every class. An answer on
    which a comparison runs out of time or memory is compared no further: it stays a class of its own.

    >>> answer_classes(["1/2", "0.5", None, "2", r"\\frac12"])
    [0, 0, None, 1, 0]
    """
    representatives: list[str] = []
    lost: set[int] = set()
    known: dict[str, int] = {}
    classes: list[int | None] = []
    for answer in answers:
        if answer is None or not answer.strip():
            classes.append(None)
            continue
        written = answer if len(answer) > MAX_ANSWER else clean(answer)
        if written not in known:
            known[written] = len(representatives)
            for number, representative in enumerate(representatives):
                if number in lost:
                    continue
                verdict = equivalent(answer, representative, time_limit=time_limit, memory_limit=memory_limit).verdict
                if verdict == "correct":
                    known[written] = number
                    break
                if verdict in ("timeout", "failed"):
                    lost.add(len(representatives))
                    break
            if known[written] == len(representatives):
                representatives.append(answer)
        classes.append(known[written])
    return classes


# ---------------------------------------------------------------------------------------------------------------------
# The matching rules of published scores, for parity. GSM8K as OpenAI matches it (grade-school-math, dataset.py): the
# first marker, and the text of the number without commas.

_GSM8K = re.compile(r"(?:####|^A:) (-?[0-9.,]+)", re.MULTILINE)


def gsm8k_official(solution: str, gold: str) -> bool:
    """Whether the first "A: N" or "#### N" of the solution is the gold's, as text: 5.00 and 5 differ.

    `gold` is the text of the published solution, marker included. The published script knows "####" only; the solutions
    published with it carry "A:" instead.
    """
    numbers = [match and match[1].strip().replace(",", "") for match in map(_GSM8K.search, (solution, gold))]
    if numbers[1] is None:
        raise ValueError(f"the gold solution holds no '#### N' or 'A: N': {gold[-80:]!r}")
    return numbers[0] == numbers[1]


# ---------------------------------------------------------------------------------------------------------------------
# The same for ZeroEval (math_eval.py): the first number of the JSON's "answer" is the first number of the gold.

_ZEROEVAL_VALUE = (re.compile(r'"answer"\s*:\s*"([^"]*)"'), re.compile(r'"answer"\s*:\s*([^,\s]*)'))


def zeroeval_official(output: str, gold: str) -> bool:
    """ZeroEval's verdict on GSM8K and MATH level 5: "2, -1" is right for 2, and "7 - 2 = 5" wrong for 5."""
    match = _ZEROEVAL_VALUE[0].search(output) or _ZEROEVAL_VALUE[1].search(output)
    numbers = [_first_number(text) for text in (match[1] if match else "", gold.replace("#", "").strip())]
    return numbers[0] is not None and numbers[0] == numbers[1]


def _first_number(text: str) -> float | None:
    text = text.replace("$", "").replace(",", "").strip()
    if fraction := re.fullmatch(r"(-?\d{1,15})\s*/\s*(-?\d{1,15})", text):
        return int(fraction[1]) / int(fraction[2]) if int(fraction[2]) else None
    number = re.search(r"-?\d+(\.\d+)?", text)
    return float(number[0]) if number else None
