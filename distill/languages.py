"""Whether a thought changes its language, for `filtering.py`: by scripts, and by function words among Latin ones.

What stands in quotation marks, in formulas, in code, or in the problem itself does not count, and terms do not: a
Chinese thought may speak of dynamic programming, an English one may name a 山. A clause in another language counts.

Languages that share a script are told apart by `FUNCTION_WORDS`, for those listed there; Russian and Ukrainian are not.
"""

# ruff: noqa: RUF001  # other scripts and quotation marks are meant

import re
from collections import Counter
from collections.abc import Iterator

SCRIPTS = {
    "Latin": "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    "Han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "Kana": "\u3041-\u309f\u30a1-\u30ff\u31f0-\u31ff",
    "Hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
}
UNSPACED = {"Han": 2, "Kana": 2, "Thai": 4}  # characters that count as a word
FOREIGN_WORDS = 3  # in another script
CLAUSE_WORDS = 6  # of Latin words in a row within another script
SENTENCE_WORDS = 5

# Words of two letters and more, and none that is an English word or a chemical symbol besides ("on", "as", "do", "no").
FUNCTION_WORDS = {
    "English": "the of and is that this we with are which have then it to be by from if can there was but because "
    "would should what when so let's not for has its their these how",
    "German": "der das und ist nicht ein eine einen wir zu mit auf für dass auch wenn dann aber oder von dem im sich "
    "noch nur wie sind haben muss kann ergibt damit bei zur zum wird",
    "French": "le la les des est et une nous que pour dans donc avec sur pas ce cette qui sont ou si mais alors du il "
    "elle aux par je peut être ainsi comme où ces",
    "Spanish": "el la los las es una que por para con entonces lo pero como del más si este esta hay un porque también "
    "cuando donde tenemos cada sus ser",
    "Portuguese": "os é uma que por para com então se mas como da dos das são mais não este esta há um ao porque "
    "também quando onde temos cada isso pela pelo na",
    "Italian": "il lo la gli le è una che con quindi se ma del della dei sono più non questo questa un perché anche "
    "quando dove abbiamo ogni di da si nel",
    "Dutch": "de het een en niet wij voor dus dat ook als dan maar zijn deze dit nog naar bij moet kan hebben wordt "
    "onze elke",
    "Swedish": "och är att det som ett inte vi på för så om av till har från eller när där kan blir varje",
    "Polish": "jest nie to że się na jak ale czy dla po tak więc jeśli przez oraz mamy które który jego",
    "Turkish": "ve bir bu için ile da daha çok ama gibi olarak kadar sonra eğer ise değil her",
    "Vietnamese": "là và của có không một những các được cho trong với này đó thì ta để khi nếu vậy ra",
    "Indonesian": "yang dan dari untuk dengan ini itu adalah tidak kita akan pada dalam jadi maka karena juga bisa",
}
_FUNCTION_WORDS = {language: frozenset(listed.split()) for language, listed in FUNCTION_WORDS.items()}

_RUN = re.compile("|".join(f"(?P<{name}>[{characters}]+)" for name, characters in SCRIPTS.items()))
_SIMPLIFIED = re.compile("[这们为么吗对时说请让还过进现发样从种虑应该问题间]")  # frequent, and not written in Japanese
_LATIN_WORD = re.compile(rf"[{SCRIPTS['Latin']}]+(?:['’][{SCRIPTS['Latin']}]+)*")
_NOT_LATIN = re.compile("[" + "".join(one for name, one in SCRIPTS.items() if name not in ("Latin", "Greek")) + "]+")
_SENTENCE = re.compile(r"(?<=[.!?;:])\s+|[\n。！？；：]+")
# Formulas are bounded, so that an opening without an end costs no more than that.
_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`"
    r"|\$\$.{0,1500}?\$\$|\$[^$\n]*\$|\\\(.{0,1500}?\\\)|\\\[.{0,1500}?\\\]"
    r"|\\begin\{(\w+\*?)\}.{0,1500}?\\end\{\1\}|\\[A-Za-z]+(?:\{[^{}]*\})*"
    r"|https?://\S+"
    r'|"[^"\n]{1,300}"|“[^”\n]{1,300}”|„[^“”\n]{1,300}[“”]|«[^»\n]{1,300}»|‘[^’\n]{1,300}’|「[^」\n]{1,300}」'
    r"|『[^』\n]{1,300}』|《[^》\n]{1,300}》|(?<!\w)'[^'\n]{1,100}'(?!\w)",
    re.DOTALL,
)


def mixed_languages(thought: str, problem: str) -> str:
    """What is foreign in a thought; "" where it keeps its language. `problem` is the text that it may quote."""
    text = _NOT_PROSE.sub(" ", thought)
    main = main_script(text)
    return (
        foreign_scripts(text, main, problem)
        or (chinese_within_japanese(text, problem) if main == "Japanese" else "")
        or (foreign_sentences(text, problem) if main == "Latin" else latin_clauses(text, problem))
    )


def main_script(text: str) -> str:
    """The script of most words: Japanese for Han and kana together, where a tenth of these is kana.

    >>> main_script("我们用 dynamic programming 求解这个问题"), main_script("この問題を解く")
    ('Han', 'Japanese')
    """
    sizes: Counter[str] = Counter({"Latin": 0})
    characters: Counter[str] = Counter()
    for run in _RUN.finditer(text):
        script = str(run.lastgroup)
        characters[script] += len(run[0])
        sizes["Han" if script == "Kana" else script] += _words(script, run[0])
    main = max(sizes, key=lambda name: sizes[name])
    if main == "Han" and characters["Kana"] * 10 >= characters["Kana"] + characters["Han"]:
        return "Japanese"
    return main


def _words(script: str, run: str) -> int:
    return -(-len(run) // UNSPACED.get(script, len(run)))


def foreign_scripts(text: str, main: str, problem: str) -> str:
    """Runs of another script than the main one, Latin apart, that the problem does not have."""
    own = {"Han", "Kana"} if main == "Japanese" else {main}
    found = []
    for run in _RUN.finditer(text):
        script = str(run.lastgroup)
        # Single characters are named rather than spoken; short words of Greek are symbols.
        if script in own or script == "Latin" or len(run[0]) < (3 if script == "Greek" else 2) or run[0] in problem:
            continue
        found.append((_words(script, run[0]), run[0]))
    if sum(size for size, _ in found) < FOREIGN_WORDS:
        return ""
    return f"{' '.join(run for _, run in found)[:60]} in {main}"


def chinese_within_japanese(text: str, problem: str) -> str:
    """A sentence of Chinese characters without any kana: eight of them where one is simplified, else fifteen."""
    for sentence in _SENTENCE.split(text):
        runs = [(run.lastgroup, run[0]) for run in _RUN.finditer(sentence)]
        han = [run for script, run in runs if script == "Han"]
        enough = sum(map(len, han)) >= (8 if _SIMPLIFIED.search(sentence) else 15)
        if enough and all(script != "Kana" for script, _ in runs) and not all(run in problem for run in han):
            return f"{sentence.strip()[:60]} in Japanese"
    return ""


def latin_clauses(text: str, problem: str) -> str:
    """Latin words in a row within another script that make a clause: some are function words of one language."""
    for sentence in _SENTENCE.split(text):
        for piece in _NOT_LATIN.split(sentence):
            found = [word.lower() for word in _LATIN_WORD.findall(piece)]
            if len(found) < CLAUSE_WORDS or _is_quoted(found, problem):
                continue
            if max(hits(found).values(), default=0) >= 2:
                return piece.strip()[:60]
    return ""


def foreign_sentences(text: str, problem: str) -> str:
    """Sentences with the function words of another language than the one that the text has most of."""
    sentences = [(piece, hits(piece)) for sentence in _SENTENCE.split(text) for piece in _pieces(sentence)]
    totals: Counter[str] = Counter()
    for _, counts in sentences:
        totals.update(counts)
    if not totals:
        return ""
    main = max(totals, key=lambda language: totals[language])
    for piece, counts in sentences:
        other, most = max(counts.items(), key=lambda item: item[1], default=(main, 0))
        own = counts.get(main, 0)
        clear = (most >= 3 and most >= 3 * own) or (most == 2 and own == 0 and len(piece) >= 8)
        if clear and other != main and not _is_quoted(piece, problem):
            return f"{' '.join(piece)[:60]}: {other} in {main}"
    return ""


def _pieces(sentence: str) -> Iterator[list[str]]:
    """The words of a sentence, of a long one some twelve at a time: it may change its language without a full stop."""
    found = [word.lower().replace("’", "'") for word in _LATIN_WORD.findall(sentence)]
    count = max(1, len(found) // 12)
    for part in range(count):
        piece = found[part * len(found) // count : (part + 1) * len(found) // count]
        if len(piece) >= SENTENCE_WORDS:
            yield piece


def hits(words: list[str]) -> dict[str, int]:
    """How many different words are function words of each language; languages without one are left out."""
    counts = {language: len(listed.intersection(words)) for language, listed in _FUNCTION_WORDS.items()}
    return {language: count for language, count in counts.items() if count}


def _is_quoted(words: list[str], problem: str) -> bool:
    """Whether four in five of the words stand in the problem."""
    known = {word.lower() for word in _LATIN_WORD.findall(problem)}
    return sum(word in known for word in words) >= 0.8 * len(words)
