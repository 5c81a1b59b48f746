r"""The answer to a mathematics question: found in what a model wrote, and compared with the gold answer.

    response --split_thought--> answer text --extract_math--> short answer --same (exact.py), then a worker--> Graded

`extract_math` is pure and linear in the length of the text. `exact.py` decides most pairs in microseconds, in exact
arithmetic; the rest goes to math-verify's parser and sympy in processes that are killed at a time and memory limit
(`math_pool.py`, `math_worker.py`, `math_oracle.py`). Nothing here imports sympy, math-verify or torch.

No tolerance is applied: 0.333 is not 1/3. Numbers, units and forms that do count as equal are the table in
`tests/eval/test_answers.py`.
"""

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from eval.exact import Undecided, clean, same
from eval.math_pool import KEPT, Failure, Timeout, pool
from eval.sample import Graded
from eval.thinking import split_thought

MATH_GRADER = "math/1"
TIME_LIMIT = 5.0  # seconds of wall time for one verdict
MEMORY_LIMIT = 1 << 30  # bytes that a worker may add to what it has
MAX_ANSWER = 10_000  # characters of an extracted answer that are graded

# ---------------------------------------------------------------------------------------------------------------------
# Extraction.


def extract_math(text: str) -> str | None:
    r"""The final answer in a text without thought, as it is written there; None where there is none.

    In this order:
    1. The last complete box (`\boxed{}`, `\fbox{}`; an empty one does not count), or the last value of the key
       "answer" in JSON, malformed JSON included: whichever stands later.
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
    boxed, box_end = _last_box(text)
    value, value_end = _last_json_answer(text)
    if boxed is not None and box_end > value_end:
        return boxed
    if value is not None:
        inner = extract_math(value) if _MARKED.search(value) else None
        return inner or _candidate(value)
    if boxed is not None:
        return boxed
    found = _last_marked(text)
    if found is not _NOTHING:
        return found if isinstance(found, str) else None
    if _OPEN_JSON.match(text):
        return None
    return _last_resort(text)


_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*(\{)?|\\.|[{}]", re.DOTALL)
_BOX_COMMAND = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*\{")
_BARE_BOX_END = re.compile(r"\$|\n|\\\)|\\\]|[.,;](?:\s|$)")


def _last_box(text: str) -> tuple[str | None, int]:
    """The content of the complete box that ends last, and where: one pass over the braces."""
    if "\\boxed" not in text and "\\fbox" not in text and "\\framebox" not in text:
        return None, -1
    stack: list[int | None] = []  # where the content begins, for the brace of a box
    best, end = None, -1
    for match in _BOX_TOKEN.finditer(text):
        token = match[0]
        if token == "{":
            stack.append(None)
        elif token == "}":
            start = stack.pop() if stack else None
            if start is not None and text[start : match.start()].strip():
                best, end = (start, match.start()), match.end()
        elif match[1]:
            stack.append(match.end())
        elif token.startswith(("\\boxed", "\\fbox")):
            stop = _BARE_BOX_END.search(text, match.end(), match.end() + 200)
            bare_end = stop.start() if stop else min(len(text), match.end() + 200)
            if text[match.end() : bare_end].strip():
                best, end = (match.end(), bare_end), bare_end
    if best is None:
        return None, -1
    # Of nested boxes the outer one ends last; its inner ones are only taken off.
    content = _BOX_COMMAND.sub("{", text[slice(*best)]).strip()
    return _without_braces(content), end


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


_JSON_KEY = re.compile(r"""["'*](?:final[_ ])?answer["'*]*\s*:\s*""", re.IGNORECASE)
_JSON_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_JSON_BARE = re.compile(r"[^,}\n]*")
_JSON_LIST = re.compile(r"\[([^\[\]\n]*)\]")
_OPEN_JSON = re.compile(r"""\s*(?:```(?:json)?\s*)?\{\s*["']\w+["']\s*:""")


def _last_json_answer(text: str) -> tuple[str | None, int]:
    """The value of the last "answer" key: a string, number or list, quoted or not, and where it ends."""
    key = None
    for key in _JSON_KEY.finditer(text):
        pass
    if key is None:
        return None, -1
    start = key.end()
    if match := _JSON_STRING.match(text, start):
        return _unescape(match[1]).strip(), match.end()
    if match := _JSON_LIST.match(text, start):
        return ", ".join(part.strip().strip("\"'") for part in match[1].split(",")), match.end()
    match = _JSON_BARE.match(text, start)
    assert match is not None
    bare = match[0].strip().strip("\"'`*").strip()
    return (None, -1) if bare in ("", "null", "None") else (_unescape(bare), match.end())


def _unescape(value: str) -> str:
    r"""JSON's escapes undone, LaTeX kept: models write both "\\frac{1}{2}" and "\frac{1}{2}"."""

    def one(match: re.Match[str]) -> str:
        letter = match[1]
        if letter in "\"/\\":
            return letter
        if letter in "nt" and match[2] is not None:
            return " "
        return match[0]

    return re.sub(r'\\(["/\\]|[nt](?=([^a-zA-Z]|$)))', one, value)


_MARKED = re.compile(
    r"""(?P<hashes>\#\#\#\#[ \t]*)
    |(?P<phrase>(?:(?:final|correct|overall)\s+)?(?:answer|result|solution)
        (?:\s+(?:to|for|of|in)\s+[^.:\n]{0,80}?)?
        (?:\s*\(?[*_]{0,3}\s+(?:is|are|would\ be|will\ be|must\ be|should\ be|equals|comes\ out\ to\ be)\b(?:\s*:)?
           |\s*[*_]{0,3}\s*[:：=]))
    |(?P<line>(?:^|\n)[ \t]*[*_]{0,2}A[*_]{0,2}[ \t]*[:：])
    |(?P<chinese>(?:最终|正确)?答案(?:是|为|[:：])\s*[:：]?)""",
    re.IGNORECASE | re.VERBOSE,
)
_NOTHING = object()
_NO_ANSWER = re.compile(
    r"""(?:(?:i\s+)?(?:do\s+not|don['’]?t|cannot|can['’]?t|could\s+not|couldn['’]?t)\b|not\b|un(?:known|clear|defined\s+here)
    |none\s+of\s+(?:the|these)\b|n/?a\b|impossible\s+to\b|no\s+(?:answer|idea)\b|i['’]m\s+not\b|___|\?|不知道|无法|null\b|\[?insert)""",
    re.IGNORECASE | re.VERBOSE,
)


def _last_marked(text: str) -> object:
    """What follows the last marker that something follows; None where that says there is no answer; else _NOTHING."""
    found: object = _NOTHING
    for match in _MARKED.finditer(text):
        after = text[match.end() : match.end() + 2000]
        answer = _after_marker(after)
        if answer:
            found = None if _NO_ANSWER.match(answer.strip("*_ $\"'")) else _candidate(answer)
    return found


_ENVIRONMENT = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_SENTENCE_END = re.compile(r"[.。](?=\s|$|\*\*|</)|[!?](?=\s|$)(?<!\d!)|\n|<\|?/?[a-z_]+\|?>|\s(?:I hope|because|since|which is)\b", re.I)


def _after_marker(text: str) -> str:
    """The rest of the line, or of the next line that is not empty, without markup around it."""
    text = text.lstrip(" \t\n*_:：`>")
    if text.startswith(("the final answer is", "The final answer is", "the answer is", "The answer is")):
        return ""  # a marker of its own
    match = _ENVIRONMENT.match(text)
    if match:
        inner = next(group for group in match.groups() if group is not None)
        rest = _SENTENCE_END.split(text[match.end() :], maxsplit=1)[0]
        # "$5$ and $7$", "$x = 1$, $x = 2$": the sentence goes on with more of it.
        if re.match(r"\s*(?:,|and\b|or\b|\\?%|[-+*/^=<>]|\\)", rest) and "$" in rest:
            return (text[: match.end()] + rest).strip()
        unit = re.match(r"\s*(\\?%|[a-zA-Z]+(?:\s+(?:per|of)\s+[a-zA-Z]+)?)\s*$", rest)
        return (inner + " " + unit[1]).strip() if unit and re.search(r"\d\s*$", inner) else inner.strip()
    return _SENTENCE_END.split(text, maxsplit=1)[0].strip().strip("*_`").strip()


_ANY_NUMBER = re.compile(r"(?<![\w.\\])(?:[$€£]\s*)?[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?(?:\s*%)?(?![\w/])|(?<!\d)[-−]?\.\d+")
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}\s+[A-Za-z]{2,}")
_HEDGED = re.compile(
    r"\b(?:not|less|fewer|greater|least|most|between|over|under|million|billion|thousand|dozen|hundred|or|cannot|no)\b", re.I
)


def _candidate(text: str) -> str | None:
    """What was captured, or the one number in it if it is a sentence around a number ("She has 18 eggs left")."""
    text = text.strip().strip("*_`").strip()
    if boxed := _last_box(text)[0]:
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
        if len(numbers) > 1 and "=" in text:
            last = text.rpartition("=")[2]
            if match := _ANY_NUMBER.match(last.strip().strip("$ ")):
                return match[0]
    return text


def _last_resort(text: str) -> str | None:
    """The last number or formula of the last 2,000 characters."""
    tail = text[-2000:]
    best, position = None, -1
    for match in _ENVIRONMENT.finditer(tail):
        inner = next(group for group in match.groups() if group is not None).strip()
        if inner and match.end() > position:
            best, position = inner, match.end()
    for match in _ANY_NUMBER.finditer(tail):
        if match.end() > position:
            best, position = match[0], match.end()
    if best is None and len(text) < 200 and "\n" not in text.strip():
        return text.strip() or None  # nothing but an answer
    return best.strip() if best else None


# ---------------------------------------------------------------------------------------------------------------------
# Grading.


def grade_math(
    response: str, gold: str, *, time_limit: float = TIME_LIMIT, memory_limit: int = MEMORY_LIMIT
) -> Graded:
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
    return equivalent(answer, gold, time_limit=time_limit, memory_limit=memory_limit)


def equivalent(
    answer: str, gold: str, *, time_limit: float = TIME_LIMIT, memory_limit: int = MEMORY_LIMIT
) -> Graded:
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
    digits = [re.fullmatch(r"\s*(-?)0*(\d+)\s*", text) for text in (answer, gold)]
    if answer.strip() == gold.strip() or (digits[0] and digits[1] and digits[0].groups() == digits[1].groups()):
        return Graded("correct", shown, "equal as text", MATH_GRADER)
    if digits[0] and digits[1]:
        return Graded("wrong", shown, "exact", MATH_GRADER)
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
# GSM8K, as OpenAI matches it (grade-school-math, dataset.py): the first marker, the text of the number without commas.

_GSM8K = re.compile(r"(?:####|A:) (-?[0-9.,]+)")


def gsm8k_official(solution: str, gold: str) -> bool:
    """Whether the first "A: N" or "#### N" of the solution is the gold's, as text: 5.00 and 5 differ.

    `gold` is the text of the published solution, marker included. The published script knows "####" only; the solutions
    published with it carry "A:" instead.
    """
    numbers = [match and match[1].strip().replace(",", "") for match in map(_GSM8K.search, (solution, gold))]
    if numbers[1] is None:
        raise ValueError(f"the gold solution holds no '#### N' or 'A: N': {gold[-80:]!r}")
    return numbers[0] == numbers[1]


