"""Thoughts labelled by hand, in seven languages: which are mixed, run in a loop, hold code or walls of text, and which
only look like it."""

# ruff: noqa: E501, RUF001  # sentences stand as they are, in their scripts

import random
import re
from collections.abc import Iterator

# Five or six sentences each of plain thinking, written for this file.
THOUGHTS = {
    "English": """Let me think about what the question asks. We have a train that leaves the station at noon and travels
at sixty miles per hour. The second train starts two hours later, so the first one has a lead of 120 miles. If the second
one is faster by thirty miles per hour, it gains thirty miles in every hour. Therefore it needs four hours to catch up.
Wait, I should check that the lead is correct. Yes, two hours at sixty miles per hour is 120 miles, so the answer is four.""",
    "Chinese": """首先我们来分析这个问题的条件。第一列火车在中午出发，速度是每小时六十英里。第二列火车晚两个小时出发，
所以第一列火车领先一百二十英里。因为第二列火车每小时快三十英里，所以它每小时可以追上三十英里。因此需要四个小时才能追上。
等一下，我再检查一下领先的距离是否正确。两个小时乘以六十等于一百二十，所以答案是四个小时。""",
    "German": """Zuerst überlege ich, was in der Aufgabe gefragt ist. Der erste Zug fährt um zwölf Uhr ab und ist mit sechzig
Kilometern in der Stunde unterwegs. Der zweite Zug startet zwei Stunden später, also hat der erste einen Vorsprung von 120
Kilometern. Wenn der zweite Zug um dreißig Kilometer schneller ist, holt er in jeder Stunde dreißig Kilometer auf. Damit
braucht er vier Stunden, bis er den ersten eingeholt hat. Ich prüfe das noch einmal: Zwei Stunden mit sechzig sind 120, das
stimmt.""",
    "French": """D'abord, je réfléchis à ce que demande la question. Le premier train part à midi et roule à soixante kilomètres
par heure. Le second part deux heures plus tard, donc le premier a une avance de 120 kilomètres. Comme le second est plus
rapide de trente kilomètres par heure, il gagne trente kilomètres dans chaque heure. Il lui faut donc quatre heures pour
le rattraper. Je vérifie encore une fois : deux heures à soixante, cela fait 120, donc la réponse est quatre.""",
    "Spanish": """Primero pienso en lo que pide la pregunta. El primer tren sale al mediodía y viaja a sesenta kilómetros por
hora. El segundo sale dos horas más tarde, entonces el primero tiene una ventaja de 120 kilómetros. Como el segundo es más
rápido por treinta kilómetros cada hora, gana treinta kilómetros en una hora. Por lo tanto necesita cuatro horas para
alcanzarlo. Reviso otra vez los datos del problema: dos horas por sesenta son 120, así que la respuesta es cuatro.""",
    "Russian": """Сначала подумаем, что спрашивается в задаче. Первый поезд выходит в полдень и едет со скоростью шестьдесят
километров в час. Второй поезд выходит на два часа позже, поэтому первый опережает его на 120 километров. Так как второй
быстрее на тридцать километров в час, он за каждый час догоняет тридцать километров. Значит, ему нужно четыре часа. Проверим
ещё раз: два часа по шестьдесят километров дают 120, всё верно.""",
    "Japanese": """まず、問題が何を求めているのかを考えます。最初の列車は正午に出発し、時速六十キロで走ります。二番目の列車は
二時間後に出発するので、最初の列車は百二十キロ先にいます。二番目の列車は毎時三十キロ速いので、一時間に三十キロずつ追いつきます。
したがって、追いつくまでに四時間かかります。念のためにもう一度確かめると、二時間かける六十は百二十なので正しいです。""",
}


def mixed_languages() -> Iterator[tuple[bool, str, str]]:
    """(mixed, thought, problem)."""
    for language, text in THOUGHTS.items():
        yield False, text, ""
        for other, continued in THOUGHTS.items():
            if other == language:
                continue
            half = continued[len(continued) // 2 :]
            yield True, f"{text}\n\n{half}", ""  # turns mid-way
            yield True, f"{_middle(text)[0]}\n{_sentence(continued)}\n{_middle(text)[1]}", ""  # one sentence
            yield False, text, f"Translate: {_sentence(continued)}"  # speaks of a problem in another language
            yield False, f"{text}\n{_sentence(continued)}", f"Translate: {_sentence(continued)}"  # quotes the problem
            yield False, f"{text}\nThe text says: “{_sentence(continued)}”", _english(language)
    for thought, problem in NOT_MIXED:
        yield False, thought, problem
    for thought in MIXED:
        yield True, thought, ""


def _english(language: str) -> str:
    """So that the English frame of a quotation is itself no foreign sentence."""
    return "" if language == "English" else "The text says:"


def _sentence(text: str) -> str:
    """The second sentence, a full clause."""
    for mark in ("。", ". "):
        if mark in text:
            return text.split(mark)[1].strip().replace("\n", " ") + mark.strip()
    raise ValueError(text)


def _middle(text: str) -> tuple[str, str]:
    mark = "。" if "。" in text else ". "
    parts = text.split(mark)
    half = len(parts) // 2
    return mark.join(parts[:half]) + mark.strip(), mark.join(parts[half:])


NOT_MIXED = [
    # Chinese with LaTeX and English terms.
    (
        "我们设 $f(x) = x^2 + 2x + 1$，那么 \\frac{df}{dx} = 2x + 2。这里使用 dynamic programming 来求解，时间复杂度是 O(n \\log n)。\n"
        "因此根据 Cauchy-Schwarz 不等式，可以得到 \\[ \\left(\\sum a_i b_i\\right)^2 \\le \\sum a_i^2 \\sum b_i^2 \\]\n"
        "这就是 Python 里面的 list comprehension，也就是 GPT 和 BERT 都会用到的 attention mechanism。",
        "",
    ),
    (
        "用 Breadth First Search 算法，先把起点放进 queue，然后依次取出每个节点，把它的邻居加入 queue，直到找到终点为止。",
        "",
    ),
    ("根据 law of the excluded middle，命题要么为真，要么为假，所以这里只有两种情况需要讨论，答案是第一种。", ""),
    (
        "模型是 Bidirectional Long Short Term Memory Recurrent Neural Network，共有三层，参数量约为两百万，所以选第二个。",
        "",
    ),
    # English that quotes a word of the problem, or names one.
    ("The word for tomorrow is 明天 in Chinese, so the boy speaks of Tuesday, which is the second answer.", ""),
    (
        "The word 明天 means tomorrow, and 昨天 means yesterday, so the boy who says 明天 means Tuesday.",
        "他说明天，不是昨天。",
    ),
    (
        "The character 山 means mountain, 水 is water, and 火 is fire. So the answer has to be the first of the three.",
        "",
    ),
    (
        'The greeting "こんにちは" is Japanese and "здравствуйте" is Russian, so there are two languages in the list.',
        "",
    ),
    ("In French one says «il y a une pomme dans le sac», and the verb of that is what the question is about.", ""),
    # Greek letters and units are mathematics.
    (
        "Let α, β and γ be the angles of the triangle ΔABC, so α + β + γ = π. With μ = 3 and σ = 2, we have P(X > μ) = 0.5.",
        "",
    ),
    (
        "Угол α равен 30 градусов, а функция sin(x) возрастает. Запишем программу на Python и вызовем print(x) в цикле while.",
        "",
    ),
    # Names, Latin terms and proper nouns.
    (
        "They went from Los Angeles to San Diego and then to El Paso. The distance is 120 miles, so it took two hours.",
        "",
    ),
    (
        "This is a proof by reductio ad absurdum: suppose that there is a largest prime. Then we get a contradiction, q.e.d.",
        "",
    ),
    (
        "The restaurant has crème brûlée, pâté de foie gras and coq au vin for a total of 45 dollars, so the tip is 9.",
        "",
    ),
    (
        "Der Algorithmus heißt Depth First Search, und mit Dynamic Programming ist die Laufzeit also nicht mehr exponentiell.",
        "",
    ),
    # Mathematics almost without words; code in a formula's place.
    ("x = 3\ny = 4\nx^2 + y^2 = 25\nsqrt(25) = 5", ""),
    ("98 + 90 = 188\n188 + 3 = 191\n191 - 70 = 121\n121 - 7 = 114", ""),
    ("t3 a2 c1\nc1 a2 t3\ntac", ""),
    (
        "Call `for el in los: print(el)` and `def que(por, una): return por` once. Then the loop ends and we have the sum.",
        "",
    ),
    ("", ""),
    # Japanese with Chinese compounds, and a Latin abbreviation.
    ("東京都新宿区西新宿の人口を調べます。DNA と RNA の違いは、糖の種類です。したがって、答えは二番目です。", ""),
]
MIXED = [
    "Let me 计算 the total cost first, 然后 subtract the discount, 所以 the answer is forty.",
    "We need the area of the circle, 因为半径是三, so the area is nine pi. The rest is easy to compute by hand.",
    "所以这个问题的答案是四。But wait, we should check that this is the correct value of the function. 好的，没有问题。",
    "The first train is faster. Поэтому второй поезд догоняет его через четыре часа. So the answer is four hours.",
    "Also haben wir zwei Fälle. In the first case we have that the number is even, and then it is divisible by two. Damit "
    "ist der zweite Fall noch offen.",
    "We know that the sum is ten. Entonces el número que buscamos es la mitad de la suma. So the answer is five.",
    "Let's see. Donc nous avons une équation avec deux inconnues, et il faut la résoudre. The solution of it is then x = 3.",
    "計算すると百二十になります。因此第二列火车需要四个小时才能追上第一列火车。したがって答えは四です。",
    "首先考虑第一种情况。つまり、この場合は答えが三になります。然后考虑第二种情况，答案是五。",
]


def repetition() -> Iterator[tuple[bool, str]]:
    """(loop, text)."""
    for text in THOUGHTS.values():
        yield False, text
        yield False, f"{text}\n\nLet me verify by going through it once more.\n\n{text}"  # twice is checking
        sentence = _sentence(text)
        yield True, f"{text}\n" + f"{sentence} " * 12
        yield True, f"{text}\n" + f"{sentence}\n" * 12
        yield True, "\n\n".join([text] * 4)
        yield (
            True,
            f"{text}\n" + "".join(f"{sentence}\n{other}\n" for other in [f"So it is {n}." for n in range(4)] * 6),
        )
    for unit in (
        "Wait, ",
        "wait wait ",
        "no. ",
        "哈",
        "等等，",
        "So, so ",
        "hmm\n",
        "The answer is 4. ",
        "Let me check. ",
    ):
        yield True, "Let me see what happens here.\n" + unit * 40
    for word in ("a", "ha", "xyz", "aaab"):
        yield True, f"The result is {word * 200}"
    yield True, "The decimal is 0." + "142857" * 100
    yield True, "| a | b |\n" + "| no | no |\n" * 60
    yield True, "0 " * 1000
    draw = random.Random(0)
    for text in THOUGHTS.values():  # the same few sentences in any order
        sentences = [one for one in re.split(r"(?<=[.。])\s*", text.replace("\n", " ")) if len(one) > 20][:4]
        yield True, " ".join(draw.choice(sentences) for _ in range(24))
    for text in NO_LOOP:
        yield False, text


NO_LOOP = [
    "Wait, wait, wait. That is not right. No, no, no: the sum must be even. Wait, let me think again.",
    "\n".join(f"Case {n}: if x = {n}, then x^2 = {n * n}, which is not equal to 50." for n in range(1, 40)),
    "\n".join(f"{n}. {n} * 7 = {n * 7}" for n in range(1, 60)),
    "\n".join(
        f"- {fruit}: no"
        for fruit in ("apple", "pear", "plum", "fig", "lime", "kiwi", "lemon", "mango", "peach", "melon", "grape")
    ),
    "| A | B | A and B |\n|---|---|---|\n" + "\n".join("| false | false | false |" for _ in range(8)),
    "\\begin{pmatrix}\n" + "0 & 0 & 0 & 0 & 0 & 0 \\\\\n" * 12 + "\\end{pmatrix}",
    "[[0, 0, 0, 0, 0, 0],\n" + " [0, 0, 0, 0, 0, 0],\n" * 6 + " [0, 0, 0, 0, 0, 0]]",
    "1/3 = 0." + "3" * 100 + " and 1/7 = 0." + "142857" * 12,
    "1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 = 20",
    "Moves: right right right right right right right right right right right right down down",
    "s1 t2 r3 a4 w5 b6 e7 r8 r9 y10\ny10 r9 r8 e7 b6 w5 a4 r3 t2 s1",
    "=" * 120 + "\nSummary\n" + "=" * 120,
    "Heads, tails, heads, tails, heads, tails: the pattern has period two, and so the next one is heads.",
    "\n".join(f"f({n}) = f({n - 1}) + f({n - 2})" for n in range(2, 40)),
    "binary: 1111111111111111111111111111111100000000000000000000000000000000",
    "The URL is https://example.org/aaaa/bbbb/cccc/dddd/eeee/ffff/gggg/hhhh/iiii/jjjj/kkkk/llll/mmmm",
    "\n".join(["x = x + 1", "print(x)"] * 3),
    "",
]

CODE = [
    "Let me write it.\n```python\nprint(1)\n```\nSo it prints 1.",
    "Try this:\n  ```\n  x = 1\n",
    "- first\n  ~~~c\n  int x;\n  ~~~",
    "Run ```ls -l``` there.",
    "\\begin{lstlisting}\nx = 1\n\\end{lstlisting}",
    "> ```js\n> let a = 1\n> ```",
]
NO_CODE = [
    "Call `print(x)` and then `len(x)`, which gives 3.",
    "The quote marks '' and `` are used in TeX.",
    "In code that would be x = x + 1, so x grows.",
    "    an indented\n    formula: a + b",
    "about ~~ 3 ~~ or so",
    "\\begin{align} a &= b \\end{align}",
]


def paragraphs() -> Iterator[tuple[bool, str]]:
    """(too long for 1,000 characters, text)."""
    for text in THOUGHTS.values():
        line = " ".join(text.split())
        wall = (line + " ") * (1200 // len(line) + 1)
        yield True, f"{line}\n\n{wall}"
        yield False, "\n\n".join([line] * 12)
        yield False, "\n".join([line] * 12)
    words = " ".join(THOUGHTS["English"].split() * 4)
    wrapped, line = [], ""
    for word in words.split():
        if len(line) + len(word) > 90:
            wrapped.append(line)
            line = ""
        line = f"{line} {word}".strip()
    yield True, "\n".join([*wrapped, line])
    yield False, "\n".join(f"Step {n}: we add {n} to the sum and get {n * (n + 1) // 2}." for n in range(100))
    yield False, "\n".join(f"| {n} | {n * n} | {n**3} |" for n in range(200))
    yield False, ""
