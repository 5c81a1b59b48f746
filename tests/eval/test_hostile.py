"""Inputs made to hang, bloat, crash or take over a grader: each is back in time, with its status, and hurts none."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eval.answers import answer_classes, equivalent, extract_math, grade_math, grade_math_many
from eval.math_pool import pool

LIMIT = 1.0
SLACK = 0.5
MEMORY = 256 << 20
REPOSITORY = Path(__file__).parents[2]

_MATRIX = r"\begin{pmatrix}" + r" \\ ".join(" & ".join("1" for _ in range(40)) for _ in range(40)) + r"\end{pmatrix}"
_INVERSE = (
    r"\begin{pmatrix}"
    + r" \\ ".join(" & ".join(f"x_{{{i}{j}}}" for j in range(8)) for i in range(8))
    + r"\end{pmatrix}^{-1}"
)
_OWNED = "/tmp/owned_by_a_grader_test"

HOSTILE = {
    # towers and large numbers
    "tower": "9^{9^{9^{9^9}}}",
    "tower of plain text": "9^9^9^9^9",
    "tower of twos": "2^{2^{2^{2^{2^{2}}}}}",
    "power of a power": "((((9^9)^9)^9)^9)^9",
    "large base": "123456789^{987654321}",
    "negative tower": "-9^{-9^{9^9}}",
    "tower of fractions": r"\left(\frac{1}{3}\right)^{10^{10^{10}}}",
    "tower under a root": r"\sqrt[3]{9^{9^{9^9}}}",
    "tower of symbols": "x^{x^{x^{x^{x^{x^{99999}}}}}}",
    "tower in a point": "(1, 9^{9^{9^9}})",
    "tower in a set": r"\{1, 9^{9^{9^9}}\}",
    "scientific": "1e999999999",
    "scientific in the negative": "1e-999999999",
    "googolplex": "10^{10^{100}}",
    "a million digits": "7" * 1_000_000,
    "ten thousand digits": "7" * 9_999,
    "a million decimals": "0." + "3" * 1_000_000,
    "large fraction": rf"\frac{{{'7' * 4000}}}{{{'3' * 4000}}}",
    # factorials and their kin
    "factorial": "99999999!",
    "factorial of a factorial": "((((9!)!)!)!)!",
    "factorial marks": "3" + "!" * 50,
    "large binomial": r"\binom{10^{12}}{10^{6}}",
    "gamma": r"\Gamma(10^{12})",
    "primorial": r"\prod_{k=1}^{10^{9}} k",
    # sums, integrals, limits
    "sum to 10^100": r"\sum_{k=1}^{10^{100}} k^{99}",
    "sum of reciprocals": r"\sum_{k=1}^{10^{9}} \frac{1}{k}",
    "nested sums": r"\sum_{a=1}^{999}\sum_{b=1}^{999}\sum_{c=1}^{999} a^b c",
    "integral": r"\int_0^1 \frac{\sin(x^{7}) e^{x^{11}}}{\sqrt{1+x^{13}}} dx",
    "nested integrals": r"\int_0^1\int_0^x\int_0^y \sin(x y z)^{9} e^{x+y} dz dy dx",
    "limit": r"\lim_{x \to 0} \frac{\sin(\sin(\sin(\sin x)))-x}{x^{9}}",
    "derivative": r"\frac{d}{dx}\left(x^{x^{x^{x^{x}}}}\right)",
    # depth
    "deep parentheses": "(" * 2_000 + "1" + ")" * 2_000,
    "deep braces": "{" * 4_000 + "1" + "}" * 4_000,
    "deep brackets": "[" * 4_000 + "1" + "]" * 4_000,
    "open parentheses": "(" * 9_000,
    "nested fractions": r"\frac{1}{1+" * 300 + "1" + "}" * 300,
    "nested roots": r"\sqrt{1+" * 400 + "1" + "}" * 400,
    "nested powers": "2^{" * 400 + "1" + "}" * 400,
    "nested absolute values": "|" * 1_500 + "x" + "|" * 1_500,
    "nested sets": r"\{" * 1_000 + "1" + r"\}" * 1_000,
    "many signs": "-" * 3_000 + "1",
    "many plus-minus": r"\pm 1 " * 200,
    # width
    "open boxes": "\\boxed{" * 100_000,
    "long sum": "+".join(f"x_{{{k}}}" for k in range(1_000)),
    "long product": "".join(f"(x+{k})" for k in range(300)),
    "expansion": "(a+b+c+d+e+f+g+h)^{60}",
    "expansion of symbols": r"(\sin a+\sin b+\sin c+\sin d)^{40}",
    "long list": ",".join(str(k) for k in range(2_000)),
    "list of opaque things": ",".join(rf"\sin {k}" for k in range(200)),
    "long equation": "=".join("x" for _ in range(2_000)),
    "large matrix": _MATRIX,
    "matrix of 1000 by 1000": r"\begin{pmatrix}" + (r"1 & " * 999 + r"1 \\ ") * 1000 + r"\end{pmatrix}",
    "symbolic inverse": _INVERSE,
    "power of a matrix": _MATRIX + "^{999999}",
    "roots that do not combine": "+".join(rf"\sqrt[{k % 7 + 3}]{{{k}}}" for k in range(2, 60)),
    "trigonometry": "+".join(rf"\sin({k}^\circ)\cos({k + 1}^\circ)\tan({k + 2}x)" for k in range(1, 40)),
    "logarithms": r"\log_{" * 60 + "2" + "}{3}" * 60,
    "line of 1 MB": "x+" * 500_000 + "x",
    "words of 1 MB": "lorem ipsum " * 80_000,
    "spaces": "1" + " " * 9_000 + "2",
    "commas": "," * 9_000,
    "relations": "<" * 3_000,
    "text commands": r"\text{a}" * 1_000,
    "catastrophic for a regex": "a" * 5_000 + "!" + "a" * 4_000,
    "digits and letters": "1a" * 4_000,
    # characters
    "null bytes": "\x00" * 100 + "1",
    "surrogates": "\ud800\udfff" * 50,
    "digits of other scripts": "٣٤٥६७८" * 100,
    "right to left": "\u202e5\u202c" * 50,
    "emoji": "🧮" * 500,
    "combining": "e" + "\u0301" * 5_000,
    "superscript digits": "x" + "⁹" * 500,
    "ligatures": "ﷺ" * 500,
    # code
    "import": f"__import__('os').system('touch {_OWNED}')",
    "import in mathematics": rf"\frac{{__import__('os').system('touch {_OWNED}')}}{{2}}",
    "lambda": "(lambda: (lambda f: f(f))(lambda f: f(f)))()",
    "class walk": "().__class__.__bases__[0].__subclasses__()",
    "eval in text": rf"\text{{eval(open('{_OWNED}','w'))}}",
    "symbol with code": rf"x_{{__import__('os').system('touch {_OWNED}')}}",
    "operatorname with code": rf"\operatorname{{exec}}(open('{_OWNED}', 'w'))",
    "macro": r"\def\x{\x\x}\x",
    "macro that repeats": r"\newcommand{\a}{\a\a\a}\a",
    "input": r"\input{/etc/passwd}",
    "write": rf"\immediate\write18{{touch {_OWNED}}}",
    "exit": "exit()",
    "quotes": "'" * 3_000 + '"' * 3_000,
    "JSON": '{"answer": ' * 500,
    "template": "{{7*7}}${7*7}#{7*7}",
    "format": "%s%n%x" * 200,
    # odd values
    "nan": "nan", "division by zero": r"\frac{1}{0}", "zero to the zero": "0^0", "infinite": r"\infty - \infty",
    "imaginary": "i^{i^{i^{i^{i}}}}", "modulus": r"10^{10^{10}} \bmod 7", "floor": r"\lfloor 10^{10^{10}} \pi \rfloor",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def started():
    equivalent(r"\cot x", r"\tan x")
    yield
    assert not Path(_OWNED).exists()


def judged(name: str, gold: str = r"\cot(x)+1") -> float:
    """Grades one input in its box; the seconds it took. The gold is one that the exact path cannot read."""
    start = time.perf_counter()
    graded = grade_math(rf"So \boxed{{{HOSTILE[name]}}}", gold, time_limit=LIMIT, memory_limit=MEMORY)
    seconds = time.perf_counter() - start
    assert graded.verdict in ("wrong", "timeout", "failed", "no_answer"), graded
    assert seconds < LIMIT + SLACK, (name, seconds, graded.verdict)
    return seconds


def test_there_are_enough():
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize("name", HOSTILE)
def test_from_the_main_thread(name):
    judged(name)


def test_from_threads_and_the_workers_stay_small():
    """All of them, eight at a time, while an ordinary question is asked again and again."""
    ordinary, sizes, done = [], [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            ordinary.append(grade_math(r"\boxed{\frac{\cos x}{\sin x}}", r"\cot x").verdict)
            sizes.append(_largest_worker())
            time.sleep(0.05)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(_graded_in_time_under_load, HOSTILE))
    finally:
        done.set()
        asker.join()
    assert set(ordinary) == {"correct"}
    assert max(sizes) < MEMORY + (200 << 20), max(sizes) >> 20


def _graded_in_time_under_load(name: str) -> None:
    # Eight at a time on two cores also hold this interpreter's lock and its processors: the slack is theirs.
    start = time.perf_counter()
    graded = grade_math(rf"\boxed{{{HOSTILE[name]}}}", r"\cot x", time_limit=LIMIT, memory_limit=MEMORY)
    assert graded.verdict in ("wrong", "timeout", "failed", "no_answer"), (name, graded)
    assert time.perf_counter() - start < LIMIT + SLACK, name


def test_from_a_running_event_loop():
    """Directly in a coroutine, and beside the loop in threads."""

    async def main() -> None:
        judged("tower in a set")
        slow = [
            asyncio.to_thread(judged, name) for name in ("tower", "sum to 10^100", "integral", "tower under a root")
        ]
        quick = asyncio.to_thread(grade_math, r"\boxed{\frac{\cos x}{\sin x}}", r"\cot x")
        *_, graded = await asyncio.gather(*slow, quick)
        assert graded.verdict == "correct"

    asyncio.run(main())


@pytest.mark.slow
def test_every_input_from_a_thread_and_from_an_event_loop():
    for name in HOSTILE:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(judged, name).result()

        async def main(name: str = name) -> None:
            judged(name)

        asyncio.run(main())


def test_time_and_memory_have_their_statuses():
    spinning = equivalent(r"\sin(9^{9^{9^9}})", r"\cot 1", time_limit=0.7)
    assert (spinning.verdict, "0.7 s" in spinning.detail) == ("timeout", True)
    bloated = equivalent(r"\sin 1+3^{9999999}", r"\cot 1", time_limit=20, memory_limit=1 << 18)
    assert (bloated.verdict, "memory" in bloated.detail) == ("failed", True), bloated
    assert equivalent("x+" * 6000 + "x", "5").verdict == "failed"
    assert equivalent(r"\tan x", r"\cot x").verdict == "wrong"  # the next call has a worker again


def test_a_hostile_gold_is_bounded_too():
    start = time.perf_counter()
    assert equivalent("5", r"\sin(9^{9^{9^9}})", time_limit=0.5).verdict in ("timeout", "failed")
    assert time.perf_counter() - start < 0.5 + SLACK


def test_many_keep_their_order_and_lose_no_verdict():
    pairs = [(rf"\boxed{{{k}}}", str(k + k % 2)) for k in range(40)]
    pairs[7:7] = [(r"\boxed{\sin(9^{9^{9^9}})}", r"\cot 1")]
    verdicts = [graded.verdict for graded in grade_math_many(pairs, time_limit=0.5)]
    assert verdicts.pop(7) in ("timeout", "failed")
    assert verdicts == ["correct", "wrong"] * 20


def test_a_killed_worker_is_replaced_in_milliseconds():
    equivalent(r"\sin(9^{9^{9^9}})", r"\cot 1", time_limit=0.3)
    assert equivalent(r"\tan x", r"\cot x").verdict == "wrong"
    assert pool()._idle
    for worker in list(pool()._idle):
        os.kill(worker.pid, signal.SIGKILL)
    start = time.perf_counter()
    assert equivalent(r"\tan x", r"\frac{\sin x}{\cos x}").verdict == "correct"
    assert time.perf_counter() - start < 1.0


def test_a_killed_zygote_is_started_again():
    zygote = pool()._zygote
    assert zygote is not None
    zygote.kill()
    zygote.wait()
    assert equivalent(r"\tan x", r"\frac{\sin x}{\cos x}").verdict == "correct"


def _children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(status.parent.name))
    return found


def _largest_worker() -> int:
    zygote = pool()._zygote
    sizes = [0]
    for pid in _children(zygote.pid) if zygote else []:
        try:
            sizes.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"))
        except OSError:
            continue
    return max(sizes)


def _run(code: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(code)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_die_with_a_caller_that_is_killed():
    process = _run(r"""
        import threading, time
        from eval.answers import equivalent
        from eval.math_pool import pool
        equivalent(r"\tan x", r"\cot x")
        threading.Thread(target=equivalent, args=(r"\sin(9^{9^{9^9}})", r"\cot 1"), kwargs={"time_limit": 60}).start()
        time.sleep(0.3)
        print(pool()._zygote.pid, flush=True)
        time.sleep(60)
    """)
    zygote = int(process.stdout.readline())
    family = [zygote, *_children(zygote)]
    assert len(family) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 5
    while any(_alive(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in family if _alive(pid)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_die_with_a_killed_zygote():
    equivalent(r"\tan x", r"\cot x")
    zygote = pool()._zygote
    assert zygote is not None
    with ThreadPoolExecutor(1) as thread:
        spinning = thread.submit(equivalent, r"\sin(9^{9^{9^9}})", r"\cot 1", time_limit=3)
        time.sleep(0.3)
        workers = _children(zygote.pid)
        zygote.kill()
        zygote.wait()
        assert spinning.result().verdict in ("failed", "timeout")
    assert workers
    assert not [pid for pid in workers if _alive(pid)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_forked_child_does_not_keep_the_workers_of_a_dead_parent():
    process = _run(r"""
        import os, time
        from eval.answers import equivalent
        from eval.math_pool import pool
        equivalent(r"\tan x", r"\cot x")
        if (child := os.fork()) == 0:
            os.close(1), os.close(2)
            time.sleep(30)
            os._exit(0)
        print(pool()._zygote.pid, child, flush=True)
        time.sleep(30)
    """)
    zygote, child = map(int, process.stdout.readline().split())
    family = [zygote, *_children(zygote)]
    process.kill()
    process.communicate()
    try:
        deadline = time.monotonic() + 5
        while any(_alive(pid) for pid in family) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert _alive(child)
        assert not [pid for pid in family if _alive(pid)]
    finally:
        os.kill(child, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_a_program_ends_at_once_and_silently():
    """With warnings as errors: no process, socket or thread is left, also while a daemon thread still grades."""
    process = _run(r"""
        import threading, time
        from eval.answers import equivalent, grade_math_many
        assert [g.verdict for g in grade_math_many([("\\boxed{\\tan x}", "\\cot x")] * 4)] == ["wrong"] * 4
        spin = {"target": equivalent, "args": (r"\sin(9^{9^{9^9}})", r"\cot 1"), "kwargs": {"time_limit": 30}}
        threading.Thread(**spin, daemon=True).start()
        time.sleep(0.2)
    """)
    start = time.monotonic()
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (0, "", "")
    assert time.monotonic() - start < 10


def test_a_forked_child_has_workers_of_its_own():
    process = _run(r"""
        import os, time
        from eval.answers import equivalent
        from eval.math_pool import pool
        ask = lambda: equivalent(r"\tan x", r"\frac{\sin x}{\cos x}", time_limit=60).verdict
        assert ask() == "correct"
        ours = pool()._zygote.pid
        if (child := os.fork()) == 0:
            assert ask() == "correct" and pool()._zygote.pid != ours
            pool().stop()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert ask() == "correct" and pool()._zygote.pid == ours
    """)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "", "")


def test_from_a_process_whose_main_module_does_work():
    """Nothing imports the caller's `__main__` again: this program would start itself over and over."""
    process = _run(r"""
        print("once", flush=True)
        from eval.answers import equivalent
        assert equivalent(r"\tan x", r"\cot x").verdict == "wrong"
    """)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "once\n", "")


def test_extraction_and_votes_take_anything():
    for text in HOSTILE.values():
        start = time.perf_counter()
        extract_math(text)
        assert time.perf_counter() - start < 1
    names = ("surrogates", "null bytes", "import", "nan", "division by zero", "open parentheses")
    assert len(answer_classes([HOSTILE[name] for name in names], time_limit=LIMIT)) == len(names)
