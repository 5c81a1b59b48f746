r"""Choices A to J: how they are shown, in which order, and which one an answer names.

The chain that reads the letter is part of a protocol: on 12,020 real answers to MMLU-Pro, the official chain gives
70.25 % and ours, which takes the last statement instead of the first, 72.01 %. Three chains, by name in `CHAINS`:

- `default`, ours: only what the text states counts, and a miss is never a letter.
- `mmlu_pro`: the three patterns of TIGER-AI-Lab/MMLU-Pro, `evaluate_from_api.py`, without its random guess.
- `simple_evals`: OpenAI's pattern for the prompt that ends in 'Answer: $LETTER', first match.

The default chain reads the text from its end, tier by tier; a tier is asked only if those before it say nothing:

1. the key of a JSON object (`"answer": "B"`): the form was asked for, and its reasoning may name other letters;
2. statements of the answer, the last of which holds, since a model that corrects itself does so below:
   `\boxed{B}`, "Answer: B", "the correct option is (B)", "B is the correct answer", 答案是B, 故选：C;
3. weaker statements, which hold only if they agree: "Option B is correct", "I choose B", "Therefore, (B).", 选B, B正确;
4. the letter alone, or with the text of its choice, as the whole answer or as its first or last line.

A statement that names no single choice ("Answer: I don't know", "None of the above", "either A or B", a letter beyond
the choices) is an answer too, namely none: nothing above it is read. A conditional one ("if the answer is B") states
nothing, and a denied one ("the answer is not B") takes back a B above it and no more. "A" before a word is the article
and "I" the pronoun, unless set apart. Behind an answer, a further "Question:" or "Q:" and what follows are not read.
"""

# ruff: noqa: RUF001, RUF002  # full-width letters and punctuation are what is read here

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from eval.sample import Graded, Sample
from eval.thinking import before_next_question

CHOICE_GRADER = "choice/1"
LETTERS = "ABCDEFGHIJ"


def extract_choice(text: str, n_choices: int, chain: str = "default") -> str | None:
    r"""The letter that `text` (an answer without its thought) names, or None.

    `chain` is one of `CHAINS`. The letter is one of the first `n_choices`, except with `mmlu_pro`, which reads A to J
    whatever the number of choices, as the official script does.

    >>> extract_choice("Answer: A. Wait, that is the cathode.\n\n**Answer:** $\\boxed{\\text{B}}$", 4)
    'B'
    >>> extract_choice("Answer: don't know", 4) is None
    True
    """
    if not 1 <= n_choices <= len(LETTERS):
        raise ValueError(f"n_choices={n_choices} is not in 1 to {len(LETTERS)}: letters are read from A to J")
    if chain not in CHAINS:
        raise ValueError(f"chain={chain!r} is none of {', '.join(CHAINS)}")
    return CHAINS[chain](text, n_choices)


def grade_choice(answer_text: str, gold: str, n_choices: int, chain: str = "default") -> Graded:
    """The verdict on an answer without its thought: `correct`, `wrong`, or `no_answer` where no letter is named."""
    if gold not in LETTERS[:n_choices] or len(gold) != 1:
        raise ValueError(
            f"gold={gold!r} is none of the letters of {n_choices} choices: {', '.join(LETTERS[:n_choices])}"
        )
    letter = extract_choice(answer_text, n_choices, chain)
    if letter is None:
        return Graded("no_answer", None, f"chain {chain}: no letter is named", CHOICE_GRADER)
    return Graded("correct" if letter == gold else "wrong", letter, f"chain {chain}", CHOICE_GRADER)


def grade_sample(sample: Sample, answer: str, chain: str) -> Graded:
    """`grade_choice` as a benchmark of choices uses it."""
    return grade_choice(answer, sample.gold, len(sample.choices), chain)


def render_choices(choices: Sequence[str], style: str) -> str:
    """One line for each choice; `style` is the label of the first one, as in "A) ", "A. " or "(A) ".

    >>> print(render_choices(["Paris", "Rome"], "(A) "))
    (A) Paris
    (B) Rome
    """
    if style.count("A") != 1:
        raise ValueError(f'style={style!r} must hold one A, in whose place the letters stand, as in "A) "')
    return "\n".join(style.replace("A", letter) + choice for letter, choice in zip(LETTERS, choices, strict=False))


# Permutations. `permutation[i]` is the published position of the choice shown at i, so a permutation says all by
# itself: applying another one forgets the first, and the published order is always at hand.


def permute(sample: Sample, permutation: Sequence[int]) -> Sample:
    """The sample with its choices shown in this order of their published positions; the gold letter moves along."""
    n = len(sample.choices)
    if sorted(permutation) != list(range(n)):
        raise ValueError(
            f"{tuple(permutation)} does not order the {n} choices of {sample.id}: name each of 0 to {n - 1} once"
        )
    shown = sample.permutation or tuple(range(n))
    published = dict(zip(shown, sample.choices, strict=True))
    gold = shown[LETTERS.index(sample.gold)]
    return replace(
        sample,
        choices=tuple(published[position] for position in permutation),
        permutation=tuple(permutation),
        gold=LETTERS[list(permutation).index(gold)],
    )


def permuted(sample: Sample, seed: int) -> Sample:
    """The choices in an order drawn for this item: it depends on `seed`, the task and the id, and on nothing else.

    No generator is shared, so order, limit and resuming cannot move it; sorting by hash gives each order equally often
    and the same one on every version of Python.
    """

    def key(position: int) -> bytes:
        return hashlib.sha256(f"{seed}\0{sample.task}\0{sample.id}\0{position}".encode()).digest()

    return permute(sample, sorted(range(len(sample.choices)), key=key))


# The official chains.

_MMLU_PRO_FIRST = re.compile(r"answer is \(?([A-J])\)?")
_MMLU_PRO_ANY = re.compile(r"nswer:(?<=[aA]nswer:)\s*[A-J]")  # begins with a literal, which is found fast
_MMLU_PRO_AGAIN = re.compile(r".*[aA]nswer:\s*([A-J])")
_MMLU_PRO_FINAL = re.compile(r"[A-J]\b(?<!\w.)", re.DOTALL)  # \b[A-J]\b, found faster by its letter


def _mmlu_pro(text: str, n_choices: int) -> str | None:
    r"""The official functions `extract_answer`, `extract_again` and `extract_final`, in linear time.

    `re.search(r".*[aA]nswer:\s*([A-J])")` is quadratic on a line without a match: here a line that has one is found
    first, and the pattern is tried there once.
    `\b[A-J]\b(?!.*\b[A-J]\b)` is the last letter that stands alone: the first one of the reversed text.
    """
    if found := _MMLU_PRO_FIRST.search(text):
        return found[1]
    if (found := _MMLU_PRO_ANY.search(text)) and (found := _MMLU_PRO_AGAIN.match(text, found.start() - 1)):
        return found[1]
    found = _MMLU_PRO_FINAL.search(text[::-1])
    return found[0] if found else None


_SIMPLE_EVALS = [re.compile(rf"(?i)Answer[ \t]*:[ \t]*\$?([A-{last}])\$?") for last in LETTERS]


def _simple_evals(text: str, n_choices: int) -> str | None:
    """`ANSWER_PATTERN_MULTICHOICE` of simple-evals' `common.py`, generalised from D to the last choice; first match.

    The pattern ignores case and the official comparison does not: "answer: b", or the d of "Answer: don't know", is
    never correct there, and so is no letter here.
    """
    found = _SIMPLE_EVALS[n_choices - 1].search(text)
    return found[1] if found and found[1].isupper() else None


# The default chain: texts around a marker are brought to a plain form, then read by small functions.

# Reading is linear: a marker is found at the speed of str.rfind, and what stands around it is read in a window of
# fixed size. Where one marker stands more often than this without a letter, its earlier places are not read.
MAX_MARKERS = 50
WINDOW = 120

# A reader of the text around a marker returns a letter, None where there is no statement, or this where the statement
# names no single choice.
NOTHING = ""
DENIED = "not "  # before a letter: "the answer is not B" takes back a B above it, and only that
Reader = Callable[[str, int, str], str | None]


def _default(text: str, n_choices: int) -> str | None:
    first = before_next_question(text)
    letter = _stated(first) if len(first) < len(text) else None
    letter = _stated(text) if letter is None else letter
    return letter if letter and letter in LETTERS[:n_choices] else None


def _stated(text: str) -> str | None:
    if (letter := _last(text, _JSON_KEYS)) is None and (letter := _last(text, _ANSWERS)) is None:
        weak = {said for at, word in _backwards(text, _STATEMENTS) if (said := _STATEMENTS[word](text, at, word))}
        letter = weak.pop() if len(weak) == 1 else NOTHING if weak else _bare(text)
    return letter


def _last(text: str, readers: Mapping[str, Reader]) -> str | None:
    denied = set()
    for at, word in _backwards(text, readers):
        said = readers[word](text, at, word)
        if said is not None and not said.startswith(DENIED):
            return NOTHING if said in denied else said
        if said is not None:
            denied.add(said.removeprefix(DENIED))
    return None


def _backwards(text: str, words: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Where any of the words stands, from the end of the text, each at most `MAX_MARKERS` times."""
    places = {word: at for word in words if (at := text.rfind(word)) != -1}
    left = dict.fromkeys(places, MAX_MARKERS - 1)
    while places:
        word = max(places, key=lambda word: places[word])
        at = places[word]
        yield at, word
        places[word] = text.rfind(word, 0, at) if left[word] else -1
        left[word] -= 1
        if places[word] == -1:
            del places[word]


# Plain form.

_HALF_WIDTH = str.maketrans(
    "ＡＢＣＤＥＦＧＨＩＪａｂｃｄｅｆｇｈｉｊ（）【】「」『』［］：．，；！？＝、‘’“”–—",
    'ABCDEFGHIJabcdefghij()[]""""[]:.,;!?=,\'\'""--',
)
_MARKED = re.compile(r'(\*\*|__|[{`$"]) ?\(?([A-Ja-j])\)?[.:]? ?(\*\*|__|[}`$"])')
_MARKUP = re.compile(
    r"\\(?:text\w*|math\w+|boxed|fbox|bf|rm|left|right|quad|displaystyle|[,;!()\[\]])|</?[A-Za-z]\w*>|[*_`$#{}\"]"
)


def _plain(window: str) -> str:
    """Half-width, runs of space closed, no markup; a letter set apart by markup keeps parentheses: **B** is (B)."""
    window = window if window.isascii() else window.translate(_HALF_WIDTH)
    window = _MARKUP.sub("", _MARKED.sub(r"(\2)", window))
    return re.sub(r" ?\n\s*", "\n", re.sub(r"[^\S\n]+", " ", window))


def _after(text: str, at: int) -> str:
    """The window behind a marker; where it cuts a word, an x keeps a letter at its end from standing alone."""
    return _plain(text[at : at + WINDOW] + "x" * (len(text) > at + WINDOW))


def _before(text: str, at: int) -> str:
    start = max(0, at - WINDOW // 2)
    return _plain("x" * (start > 0) + text[start:at])


# What a statement says, once its marker and verb are read.

_NAMED = re.compile(  # up to the letter: what may stand between "answer is" and "B"
    r"""[\s:,-]*
        (?:(?:most\ )?(?:likely|probably|clearly|definitely|certainly|obviously|simply|indeed|actually|therefore|thus
            |hence|then|now|still|just|again|only|best|(?:best\ described|given|represented)\ by)\b[\s:,]*){0,3}
        (?:not\ \(?[A-J]\)?[,;]?\ (?:but|rather|instead)?\ ?)?
        (?:i(?:'d|'ll|\ would|\ will)?\ (?:say|choose|pick|select|go\ with|think|believe)\ (?:that\ )?)?
        (?:(?:it|that|this)(?:'s|\ is)\ )?
        (?:the\ )?(?:(?:(?:last|first|second|third|fourth)\ )?(?:option|choice|letter|alternative|statement|answer)\b
            |选项|选择|选|择|是|为)?
        [\s:(\['<>]*([A-J])(?![A-Z0-9])(?!'[A-Z])""",
    re.VERBOSE | re.IGNORECASE,
)
_WITHDRAWN = re.compile(
    r"""[\s:,(\[]*(?:
        (?:i|we)\ (?:do\ not|don't|can\ ?not|can't|am\ not|are\ not|have\ no)\b
        |(?:don't|do\ not)\ know|unknown|unclear|uncertain|unsure|undetermined|undefined
        |not\ (?:sure|certain|given|provided|listed|available|among|possible|an?\ option|in\ the|enough)
        |none\b|neither\b|both\b|either\b|all\b|n/a\b|no\ (?:\w+\ )?(?:answer|option|choice)
        |(?:can\ ?not|can't)\ be|unable\ to|impossible|insufficient
        |不知道|不确定|无法|无正确|没有|以上都|都不|均不|都是|未知)""",
    re.VERBOSE | re.IGNORECASE,
)
_SEVERAL = re.compile(r"[\s:(\[]*([A-J]{2,10})(?![A-Za-z])")  # "ACD", as multiple selection is answered
_OTHER = r"[\s(\['<]*(?P<other>[A-J])(?![A-Z0-9])(?!'[A-Z])"
_HEDGE = re.compile(
    rf"""[)\]]*\.?
        (?:\s*,?\s*\b(?:or|and)\b(?:\ (?:maybe|possibly|perhaps|else)\b)?
            |\s*(?:[/&或和与及]|还是)+|\s*-(?=[\s(]*[A-J]\b))
        \s*(?:option|choice|选项)?{_OTHER}""",
    re.VERBOSE | re.IGNORECASE,
)
_LIST = re.compile(  # "A, B", not "A, B is wrong because"
    rf"[)\]]*\s*(?:[,;]|\s(?=[(\[]?[A-J]\b)){_OTHER}\s*(?:[)\].,;:\n]|$|\band\b|\bor\b)", re.IGNORECASE
)
_NUMERAL = re.compile(r"\s*(?:,|and\b|or\b|&)\s*(?:and\s+)?[IV]{2,}\b|\s+only\b")  # the I of "I, II and III", "I only"
_FORMULA = re.compile(r"\s*[=+^×·|∪∩≤≥]|\s*[<>*/]\s*[\w(]|\([A-Za-z0-9]\)|\s*-\s*\d|-[A-Za-z]|\s*\\\w")
_DENIED = re.compile(r" ?not[ (]+([A-J])\b")
_DENIAL = re.compile(r"[)\]]*\s+(?:is|was)\s+(?:not|wrong|incorrect|false)\b|[)\]]*\s*(?:不对|不正确|错误|是错)")
_SPECIES = re.compile(r"\. ?(?:coli|elegans|pylori|difficile|subtilis|albicans|melanogaster)\b")
_WORD = re.compile(r" '?[A-Za-z0-9]")
_CONNECTOR = re.compile(r" (?:because|since|as|due|given|which|is|was|by|and|or|with)\b")


def _named(rest: str, *, after_verb: bool = False) -> str | None:
    """What stands at the start of `rest`; `after_verb` where "a" may be an article: "the answer is a"."""
    if _WITHDRAWN.match(rest):
        return NOTHING
    if (several := _SEVERAL.match(rest)) and list(several[1]) == sorted(set(several[1])):
        return NOTHING
    if not (found := _NAMED.match(rest)):
        denied = _DENIED.match(rest)
        return DENIED + denied[1] if denied else None
    letter, tail = found[1], rest[found.end() :]
    if letter == "I" and _NUMERAL.match(tail):
        return None
    for hedge in (_HEDGE.match(tail), _LIST.match(tail)):
        if hedge and hedge["other"].upper() != letter.upper() and _stands_alone(hedge["other"], tail[hedge.end() :]):
            return NOTHING
    if _FORMULA.match(tail) or _DENIAL.match(tail) or _SPECIES.match(tail):
        return None
    enclosed = rest[found.start(1) - 1 : found.start(1)] in ("(", "[") and tail[:1] in (")", "]")
    if not enclosed and (not _stands_alone(letter, tail) or (after_verb and letter in "ai")):
        return None
    return letter.upper()


def _stands_alone(letter: str, tail: str) -> bool:
    """Whether a letter before `tail` names a choice: no article, no pronoun, and in lower case no word at all."""
    if not _WORD.match(tail):
        return True
    return letter in "BCDEFGHJ" or (letter in "AI" and _CONNECTOR.match(tail) is not None)


# What stands around the markers.

_QUALITY = (
    r"(?:correct|right|best|final|my|most\ \w+|only|true|chosen|selected|appropriate|proper|accurate"
    r"|likely|intended|closest|nearest)"
)
_BE = r"(?:is|was|(?:would|should|must|will|can\ only|has\ to)\ be|(?:seems|appears)\ to\ be|remains|becomes)"
_CONDITION = re.compile(  # before the marker: denied, conditional, or reported
    rf"""(?:(?:\b(?:if|whether|unless|suppose|assuming|were|why|doubt|nor|thought)|(?:\b(?:can)?not|n't)(?:\ \w+)?)
        \ (?:that\ )?(?:the\ )?(?:{_QUALITY}\ ){{0,2}}|(?:不是|如果|若|假如|并非|不|别|勿|未)\ ?)$""",
    re.VERBOSE | re.IGNORECASE,
)
_SEPARATOR = re.compile(  # between "answer" and what it is
    rf"""s?(?:[\s_]?(?:choice|option|letter|key|is\ the\ (?:option|choice|letter))\b)?
        (?:\ ?\([^()\n]{{1,30}}\))?
        (?:(?:\ |,\ (?=which))(?:to|that|which|for|i|here|from|among|of|in|based)\b[^\n.:;?!]{{0,60}}?)??
        \s?(?:(?P<colon>[:=>]|-+>?|→|⇒)|\b{_BE}\b\ ?(?P<then_colon>:)?)""",
    re.VERBOSE | re.IGNORECASE,
)
_HEADING = re.compile(r"[.:]?\n| (?=\(?[A-J]\)?[. ]*(?:\n|$))")
_LINE_START = re.compile(rf"(?:^|\n)[ >]*(?:(?:the|{_QUALITY}) )*$".replace("\\ ", " "), re.IGNORECASE)
_QUALIFIED = re.compile(rf"\b{_QUALITY}\ (?:answer\ )?$", re.IGNORECASE)

_BEFORE = r"(?<![A-Za-z0-9'])(?<!\d\ )(?:(?:option|choice|answer)\ )?[(\[']?(?P<letter>[A-J])[)\]']?"
_IS_THE = re.compile(  # "B is the correct" before `answer`, `option` or `choice`
    rf"""{_BEFORE}\ (?:is|(?:would|must|should|has\ to)\ be)\ (?:(?!not)\w+\ )?(?:the|my)\ (?:single\ )?
        (?:{_QUALITY}\ (?:and\ )?){{0,2}}$""",
    re.VERBOSE | re.IGNORECASE,
)
_IS = re.compile(rf"{_BEFORE}\ $", re.IGNORECASE)  # "B" before `is correct`
_CHINESE_BEFORE = r"(?<![A-Za-z0-9])(?:选项)?\(?(?P<letter>[A-J])\)?(?:选?项)?\ ?"
_CHINESE_IS_THE = re.compile(rf"{_CHINESE_BEFORE}(?:就|才)?(?:是|为)\ ?(?:最佳|正确|最终|标准|的)*$")
_CHINESE_IS = re.compile(rf"{_CHINESE_BEFORE}(?:是|为)?\ ?$")
_CHINESE_SEPARATOR = re.compile(
    r"\]?\s?(?:应该|应当|应|就|可能)?(?:\s?(?:是|为|选择|选(?!项)|:|=))+|\]?(?=\s?[(\[]?[A-J][)\]]?\s?(?:[.。,;!\n]|$))"
)
_THEREFORE = re.compile(
    r"(?:故|所以|因此|综上|应该?|应当|最终|我|则|本题|答案|可|正确的?|最佳)[,:\s]*(?:应该?|选出?)?$"
)
_SHARED = re.compile(  # before the letter: it is not named by itself
    r"(?:\b(?:nor|or|and|not|neither|if|whether|that|why|since)|(?<![A-Za-z])[A-J]\)?\s*,|[/或和与及])"
    r"\s*(?:option|choice|answer)?\s*$",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(rf",?\ (?:it\ {_BE}\ )?(?:option\ |choice\ )?\(?([A-J])\)?\s*(?:[.!]|\n|$)")
_AFTER_BOX = re.compile(  # before a box: \boxed{A} and
    r"\\boxed\{(?:\\text(?:bf)?\{)?\(?([A-J])\)?\}{1,2}\$?\s*(?:,|,?\s*(?:and|or|\\text\{\s*(?:and|or)\s*\}))\s*\$?$"
)


def _letter_before(pattern: re.Pattern[str], before: str) -> str | None:
    found = pattern.search(before)
    if not found or found["letter"].islower() or _SHARED.search(before[: found.start()]):
        return None
    return found["letter"]


def _read_json(text: str, at: int, word: str) -> str | None:
    after = text[at + len(word) : at + len(word) + WINDOW]
    found = re.match(r"\s*:", after)
    return _named(_plain(after[found.end() :])) if found else None


def _read_box(text: str, at: int, word: str) -> str | None:
    """A box that holds no letter says nothing: it may be the value, with the letter stated elsewhere."""
    depth, start = 0, at + len(word)
    for end, character in enumerate(text[start : start + WINDOW], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            said = _named(_plain(text[start : end + 1]))
            before = _AFTER_BOX.search(text, max(0, at - WINDOW), at) if said else None
            return NOTHING if before and before[1] != said else said  # \boxed{A} and \boxed{B}
    return None


def _read_answer(text: str, at: int, word: str) -> str | None:
    """`answer`, `option` and `choice`: "the answer is B", "Answer: B", "B is the best option", a heading.

    Of an option, more is asked: "the correct option is B" or "Choice: B", not "Option A:" in a discussion of each.
    """
    after = _after(text, at + len(word))
    before = _before(text, at)
    if letter := _letter_before(_IS_THE, before):
        return letter
    is_option = word.lower() != "answer"
    if text[at - 1 : at] == "/" or (is_option and after[:1] == "s"):  # </answer>; "Options:" begins a list
        return None
    if found := _SEPARATOR.match(after):
        if is_option and not _QUALIFIED.search(before) and not (found["colon"] and _LINE_START.search(before)):
            return None
        said = _named(after[found.end() :], after_verb=not (found["colon"] or found["then_colon"]))
        return None if said is not None and _CONDITION.search(before) else said
    if not is_option and (found := _HEADING.match(after)) and _LINE_START.search(before):
        return _named(after[found.end() :])
    return None


def _read_chinese_answer(text: str, at: int, word: str) -> str | None:
    before, after = _before(text, at), _after(text, at + len(word))
    if letter := _letter_before(_CHINESE_IS_THE, before):
        return letter
    found = re.match("", after) if word == "答：" else _CHINESE_SEPARATOR.match(after)
    return None if found is None or _CONDITION.search(before) else _named(after[found.end() :])


def _read_chosen(text: str, at: int, word: str) -> str | None:
    """故选：C, 因此选择B, 应选 D; 选 alone is a weaker statement."""
    before, after = _before(text, at), _after(text, at + len(word))
    found = re.match(r"择?(?:项(?:应?[是为])?)?\s?(?P<colon>:)?", after)
    if not found or _CONDITION.search(before) or not (found["colon"] or _THEREFORE.search(before)):
        return None
    return _named(after[found.end() :])


def _read_correct(text: str, at: int, word: str) -> str | None:
    return _letter_before(_IS, _before(text, at))


def _read_chinese_correct(text: str, at: int, word: str) -> str | None:
    """选项B正确, B项正确; not B不正确."""
    return _letter_before(_CHINESE_IS, _before(text, at))


def _read_choosing(text: str, at: int, word: str) -> str | None:
    """I choose B, go with option (B), 选B; several letters after such a word are no statement of the answer."""
    said = _named(_after(text, at + len(word)), after_verb=True)
    return said if said and said in LETTERS and not _CONDITION.search(_before(text, at)) else None


def _read_conclusion(text: str, at: int, word: str) -> str | None:
    """Therefore, (B). So it must be B: the letter ends the sentence."""
    found = _CONCLUDED.match(_after(text, at + len(word)))
    return found[1] if found else None


def _cased(readers: Mapping[str, Reader]) -> dict[str, Reader]:
    """Each word also capitalised and in capitals: searching a lower-cased copy instead takes longer than all else."""
    return {form: reader for word, reader in readers.items() for form in (word, word.capitalize(), word.upper())}


_JSON_KEYS = _cased({key + quote: _read_json for key in ("answer", "choice", "option", "letter") for quote in "\"'"})
_ANSWERS: dict[str, Reader] = {
    **_cased({"answer": _read_answer, "option": _read_answer, "choice": _read_answer}),
    "\\boxed": _read_box,
    "\\fbox": _read_box,
    "答案": _read_chinese_answer,
    "答：": _read_chinese_answer,
    "选": _read_chosen,
}
_STATEMENTS: dict[str, Reader] = {
    **_cased(dict.fromkeys(("choose", "select", "pick", "go with"), _read_choosing)),
    **_cased(dict.fromkeys(("therefore", "thus", "hence", "so"), _read_conclusion)),
    **dict.fromkeys(("is correct", "is right", "is the correct", "is the best", "is the most"), _read_correct),
    "选": _read_choosing,
    "正确": _read_chinese_correct,
}

_ALONE = re.compile(
    r"\s*(?:it's |it is )?(?:(?:option|choice|选项|选) ?)?[(\[]? ?([A-J]) ?[)\]]? ?[.。!]?\s*", re.IGNORECASE
)
_LABELLED = re.compile(r"\s*(?:(?:[Oo]ption|[Cc]hoice|选项) ?)?(?:\(([A-J])\)|\[([A-J])\]|([A-J]) ?[).:,。])\s*\S")
_LABELS = re.compile(r"^[ \t]*[-*(\[]{0,3}([A-J])[)\].:、]", re.MULTILINE)
_CLOSING = re.compile(
    r"\b(?:is|are|be|to|as)\s+\(([A-J])\)\s*\.?$"
    r"|\b(?:is|matches|(?:corresponds?|corresponding|closest)\ (?:most\ closely\ )?(?:to|with))\s+"
    r"(?:answer\s+)?(?:option|choice|answer)\s+[(*]*([A-J])[)*]*\.?[)*]*$"
)
_NEGATED = re.compile(r"n't\b|\b(?:not|none|neither|nor|no|cannot|never|nothing|if|whether)\b", re.IGNORECASE)


def _bare(text: str) -> str | None:
    """The letter alone, or with the text of its choice: the last line, else the first. A list of choices is neither.

    Else a letter in parentheses or an option that ends the text as what something is: "The valid conclusion is (F)."
    """
    stripped = text.strip()
    last, first = stripped[stripped.rfind("\n") + 1 :], stripped[: (stripped + "\n").index("\n")]
    for line in (last, first):
        found = _ALONE.fullmatch(_plain(line)) if len(line) <= WINDOW else None
        if found and (found[1].isupper() or line == stripped):
            return found[1].upper()
    for line, around in ((last, stripped[-20 * WINDOW :]), (first, stripped[: 20 * WINDOW])):
        plain = _plain(line[:WINDOW])
        if found := _LABELLED.match(plain):
            letter = found[1] or found[2] or found[3]
            others = set(_LABELS.findall(around.translate(_HALF_WIDTH))) - {letter}
            if not others and _named(plain) == letter:
                return letter
    ending = stripped[-WINDOW:]
    found = _CLOSING.search(ending)
    if found and found[2] and _NEGATED.search(ending, ending.rfind(". ", 0, found.start()) + 1, found.start()):
        return None
    return found[1] or found[2] if found else None


CHAINS: dict[str, Callable[[str, int], str | None]] = {
    "default": _default,
    "mmlu_pro": _mmlu_pro,
    "simple_evals": _simple_evals,
}
