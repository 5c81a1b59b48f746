"""Code: the forms of tests, what counts as equal, and programs that are wrong, hostile, or late: none passes, none
leaves the process that runs it."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distill import code_tests
from distill.code_cases import decode, read_tests, same_output
from distill.code_runner import encode
from distill.code_tests import extract_code, grade_code, network, unshare
from distill.recipe import CodeTests

LIMITS = CodeTests(allow=True, seconds=1, memory_mb=256, file_mb=1)
SIX = [{"input": "3\n", "output": "6\n"}]
TWICE = ["assert f(1) == 2", "assert f(2) == 4"]
CALLS = [{"call": "f(1)", "value": 2}, {"call": "f(2)", "value": 4}]


def answer(code: str) -> str:
    return f"Here it is:\n\n```python\n{code}\n```\n"


def verdict(code: str, tests, limits: CodeTests = LIMITS) -> tuple[str, str]:
    graded = grade_code(answer(code), tests, limits)
    return graded.verdict, graded.detail


# The program in an answer.


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```py\na\n```\nor better\n```python3\nb\n```", "b\n"),
        ("```python\na\n```\nIt prints\n```\n6\n```", "a\n"),  # sample output is no program
        ("```\na\n```\nthen\n```\nb\n```", "b\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("````python\n'''\n```\n'''\n````", "'''\n```\n'''\n"),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("```Python title\na\n```", "a\n"),
        ("```cpp\nint main() {}\n```", None),
        ("```python\nprint(", None),  # the budget cut it
        ("```python\n\n```", None),
        ("print(1)", None),
    ],
)
def test_the_last_python_block_is_the_program(text, code):
    assert extract_code(text) == code


def test_fences_are_read_in_linear_time():
    for text in ("```" + "a" * 200_000 + "`", "`" * 200_000 + "x`", " " * 200_000 + "```", "```x\n" * 50_000):
        start = time.perf_counter()
        extract_code(text)
        assert time.perf_counter() - start < 1


# Forms of tests.


@pytest.mark.parametrize(
    "value",
    [
        [{"input": "3\n", "output": "6\n"}],
        '[{"input": "3\\n", "output": "6\\n"}]',
        {"inputs": ["3\n"], "outputs": ["6\n"]},  # APPS, TACO
        '{"inputs": ["3\\n"], "outputs": ["6\\n"]}',
        {"input": ["3\n"], "output": ["6\n"]},  # CodeContests
        {"inputs": [["3", "4"]], "outputs": [["6"]]},  # lines
    ],
)
def test_forms_of_tests_of_whole_programs(value):
    tests = read_tests(value)
    assert read_tests(tests) == tests
    assert verdict("print(int(input()) * 2)", value)[0] == "correct"
    assert verdict("print(int(input()) * 3)", value)[0] == "wrong"


@pytest.mark.parametrize(
    "value",
    [
        TWICE,  # MBPP
        ["import math", "assert f(1) == math.floor(2.5)", "assert 4 == f(2)"],
        "assert f(1) == 2\nassert f(2) == 4",
        {
            "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 4",
            "entry_point": "f",
        },
        {"fn_name": "f", "inputs": [[1], [2]], "outputs": [2, 4]},  # APPS
        {"fn_name": "f", "inputs": [[1], [2]], "outputs": [[2], [4]]},  # APPS again
        {"fn_name": "f", "inputs": ["1", "2"], "outputs": ["2", "4"]},  # LiveCodeBench
        [{"fn_name": "f", "input": "1", "output": "2"}, {"fn_name": "f", "input": [2], "output": 4}],  # one by one
        CALLS,
    ],
)
def test_forms_of_tests_of_functions(value):
    tests = read_tests(value)
    assert read_tests(tests) == tests
    assert verdict("def f(x):\n    return 2 * x", value)[0] == "correct"
    assert verdict("def f(x):\n    return 2 if x == 1 else 5", value)[0] == "wrong"
    if isinstance(value, dict) and "fn_name" in value:
        assert verdict("class Solution:\n    def f(self, x):\n        return 2 * x", value)[0] == "correct"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "no tests"),
        ("", "no tests"),
        (3, "not int"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ([{"input": "1"}], "is no test"),
        ([["f(1)", 2]], "is no test"),
        (["assert f(1) = 2"], "no Python"),
        ([{"call": "f(", "value": 1}], "no Python"),
        ([*SIX, *TWICE], "cannot be mixed"),
        ('{"fn_name": "f", "inputs": ["{"], "outputs": ["1"]}', "Expecting property name"),
    ],
)
def test_what_holds_no_tests_is_an_error(value, message):
    with pytest.raises(ValueError, match=message):
        read_tests(value)


# What counts as equal.


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("6", "6\n", True),
        ("1  2 \n3\n\n", "1 2\n3", True),
        ("1 2 3", "1 2\n3", False),
        ("1\n\n2", "1\n2", False),
        ("0.33333333", "0.3333333", True),
        ("0.3334", "0.3333", False),
        ("2.0", "2", True),
        ("1e-9", "0.0", True),
        ("10000000000000001", "10000000000000000", False),  # as floats they are one
        ("nan", "nan", True),
        ("inf", "1e999", False),
        ("YES", "Yes", False),
        ("", "", True),
        ("", "0", False),
    ],
)
def test_what_is_printed(printed, expected, same):
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    ("returned", "asserted", "as_json", "value"),
    [
        ("[1, 2]", "[1, 2]", True, [1, 2]),
        ("(1, 2)", "(1, 2)", True, [1, 2]),
        ("(1, 2)", "(1, 2)", True, [1, 2.0000000001]),
        ("[1, 2]", "[1, 2, 3]", False, [1, 2, 3]),
        ("{1: [2]}", "{1: [2]}", True, {"1": [2]}),
        ("{frozenset({1}): {2}}", "{frozenset({1}): {2}}", True, None),
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}", True, {"a": 2, "b": 1}),
        ("True", "True", True, True),
        ("1", "2", False, True),  # 1 is not JSON's true
        ("0.1 + 0.2", "0.30000000000000004", True, 0.3),
        ("float('inf')", "1e999", True, None),
        ("2 + 3j", "(2+3j)", True, None),
        ("b'a'", "b'a'", True, None),
        ("'\\ud800'", "'\\ud800'", True, None),
        ("__import__('decimal').Decimal('2.5')", "2.5", True, 2.5),
        ("None", "None", True, None),
        ("iter([1])", "[1]", False, [1]),
    ],
)
def test_what_is_returned(returned, asserted, as_json, value):
    code = f"def f():\n    return {returned}"
    assert verdict(code, [f"assert f() == {asserted}"])[0] == ("correct" if as_json else "wrong")
    if value is not None or returned == "None":
        assert verdict(code, [{"call": "f()", "value": value}])[0] == ("correct" if as_json else "wrong")


def test_a_list_is_no_tuple_where_python_says_so():
    assert verdict("def f():\n    return [1, 2]", ["assert f() == (1, 2)"])[0] == "wrong"


def test_plain_data_survives_the_way():
    value = {
        "a": [1, (2.5, None), {3}],
        2: {"b": True},
        (1, "x"): -(10**30),
        frozenset({(2,)}): {},
        "": [1j, b"\xff", float("-inf")],
    }
    assert decode(encode(value)) == value
    with pytest.raises(TypeError, match="plain data"):
        encode([object()])


# Verdicts.


def test_nothing_runs_without_leave(tmp_path):
    marker = tmp_path / "ran"
    with pytest.raises(ValueError, match=r"no security boundary.*allow: true"):
        grade_code(answer(f"open({str(marker)!r}, 'w')"), SIX, CodeTests())
    assert not marker.exists()


@pytest.mark.parametrize(
    ("code", "tests", "found", "detail"),
    [
        ("print(int(input()) * 2)", SIX, "correct", "1 of 1 tests"),
        ("print(5)", SIX, "wrong", "test 1 of 1: printed '5\\n', not '6\\n'"),
        ("print(6); 1 / 0", SIX, "wrong", "ZeroDivisionError: division by zero"),
        ("print(6", SIX, "wrong", "SyntaxError"),
        ("print(6); exit(3)", SIX, "wrong", "exit 3"),
        ("x = bytearray(2**29)\nprint(6)", SIX, "wrong", "MemoryError"),
        ("for n in range(150):\n    open(str(n), 'w').close()\nprint(6)", SIX, "wrong", "may write 100 files"),
        ("print('x' * 10**6)", SIX, "wrong", "it printed far more than was expected"),
        ("print(6); exit()", SIX, "correct", ""),
        ("import atexit; atexit.register(lambda: print(6))", SIX, "correct", ""),
        ("import threading; threading.Timer(0.3, print, [6]).start()", SIX, "correct", ""),
        ("if __name__ == '__main__': print(6)", SIX, "correct", ""),
        ("import sys; sys.stdout.write(str(2 * int(sys.stdin.buffer.read())))", SIX, "correct", ""),
        ("open('a', 'w').write('6'); print(open('a').read())", SIX, "correct", ""),
        ("import os; print(6 if not os.listdir() and 'SECRET' not in os.environ else 5)", SIX, "correct", ""),
        ("def f(x):\n    return 2 * x", TWICE, "correct", "2 of 2 tests"),
        ("print('noise' * 1000)\ndef f(x):\n    print('noise')\n    return 2 * x", TWICE, "correct", ""),
        ("def f(x):\n    return 2", TWICE, "wrong", "test 2 of 2: f(2) is 2"),
        ("def g(x):\n    return 2", TWICE, "wrong", "NameError"),
        ("def f(x):\n    return x + g", TWICE, "wrong", "test 1 of 2: NameError"),
    ],
)
def test_verdicts(code, tests, found, detail, monkeypatch):
    monkeypatch.setenv("SECRET", "hf_abc")
    graded = grade_code(answer(code), tests, LIMITS)
    assert (graded.verdict, graded.grader) == (found, "code/1")
    assert detail in graded.detail
    assert graded.answer == code + "\n"


def test_no_program_is_no_answer():
    graded = grade_code("I would sort the list.", SIX, LIMITS)
    assert (graded.verdict, graded.answer) == ("no_answer", None)


def test_each_input_has_a_fresh_process():
    code = "import builtins\nprint(getattr(builtins, 'seen', 0) + int(input()))\nbuiltins.seen = 1"
    tests = [{"input": str(one), "output": str(one)} for one in range(5)]
    assert verdict(code, tests) == ("correct", "5 of 5 tests")


def test_the_order_of_a_set_is_the_same_in_every_run():
    code = "print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}))"
    printed = {verdict(code, SIX)[1] for _ in range(3)}
    assert len(printed) == 1


# Tricks: none of these programs computes anything, and none may pass.

TRICKS = {
    "ends before the tests": "import sys\nsys.exit(0)",
    "leaves without a word": "import os\nos._exit(0)",
    "equals everything": "class E:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return E()",
    "an int that equals everything": (
        "class E(int):\n    def __eq__(self, other):\n        return True\n    __hash__ = int.__hash__\n"
        "def f(x):\n    return E(7)"
    ),
    "patches what compares": "import builtins, operator\noperator.eq = lambda *_: True\nbuiltins.all = lambda x: True",
    "writes to every descriptor": (
        "import os\nfor n in range(3, 64):\n    try:\n"
        '        os.write(n, b\'{"test": 0, "value": 2}\\n{"test": 1, "value": 4}\\n\')\n'
        "    except OSError:\n        pass\nos._exit(0)"
    ),
    "names its own exception": "AssertionError = BaseException\ndef f(x):\n    raise SystemExit",
    "never returns plain data": "def f(x):\n    l = []\n    l.append(l)\n    return l",
    "nests deeply": "def f(x):\n    l = []\n    for _ in range(10**5):\n        l = [l]\n    return l",
    "raises an error without words": (
        "class E(BaseException):\n    def __str__(self):\n        raise self\ndef f(x):\n    raise E"
    ),
}


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("tests", [TWICE, SIX, pytest.param(CALLS, marks=pytest.mark.slow)])
def test_tricks_pass_nothing(trick, tests):
    assert verdict(TRICKS[trick], tests)[0] == "wrong"


def test_what_is_expected_is_not_in_the_process():
    """The program looks through all its objects, and the files and arguments of its process, for the value."""
    code = (
        "import gc, re, sys\nseen = repr(gc.get_objects()) + repr(sys.argv) + open('/proc/self/cmdline').read()\n"
        "found = re.findall('86753' + '09[0-9]+', seen)\ndef f(x):\n    return int(found[0]) if found else 0"
    )
    assert verdict(code, ["assert f(0) == 86753091"]) == ("wrong", "test 1 of 1: f(0) is 0")


# Hostile programs: each ends in time, and touches nothing outside.

HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "processes": "import subprocess\nsubprocess.run(['touch', {outside!r}])",
    "system": "import os\nos.system('touch ' + {outside!r})",
    "exec": "import os\nos.execv('/usr/bin/touch', ['touch', {outside!r}])",
    "spawn": "import os\nos.posix_spawn('/usr/bin/touch', ['touch', {outside!r}], {{}})",
    "kill everyone": "import os\nos.kill(-1, 9)",
    "kill the group": "import os\nos.killpg(0, 9)",
    "writes outside": "open({outside!r}, 'w').write('x')",
    "writes outside by descriptor": "import os\nos.open({outside!r}, os.O_CREAT | os.O_WRONLY)",
    "writes outside after a step": "import os\nos.chdir(os.path.dirname({outside!r}))\nopen('outside', 'w')",
    "writes outside through a link": "import os\nos.symlink(os.path.dirname({outside!r}), 'l')\nopen('l/outside', 'w')",
    "makes a folder": "import os\nos.mkdir({outside!r})",
    "removes": "import os\nos.remove({kept!r})",
    "removes a tree": "import os, shutil\nshutil.rmtree(os.path.dirname({kept!r}))",
    "renames": "import os\nos.rename({kept!r}, 'mine')",
    "truncates": "import os\nos.truncate({kept!r}, 0)",
    "changes rights": "import os\nos.chmod({kept!r}, 0)",
    "many files": "for n in range(10**6):\n    open(str(n), 'w').write('x')",
    "a large file": "open('a', 'w').write('x' * 10**7)",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5).send(b'x')",
    "network by urllib": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/', timeout=5)",
    "foreign functions": "import ctypes\nctypes.CDLL(None).system(b'touch ' + {outside!r}.encode())",
    "memory": "x = [0] * 10**9",
    "memory, slowly": "x = []\nwhile True:\n    x.append(bytearray(10**6))",
    "threads": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,)).start()",
    "output": "while True:\n    print('x' * 10**4)",
    "errors": "import sys\nwhile True:\n    sys.stderr.write('x' * 10**4)",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (100, 100))\nwhile True:\n    pass",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
    "a large number": "print(9**9**9)",
    "a large source": "eval('(' * 10**6)",
    "spins": "while True:\n    pass",
    "spins, deaf": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass",
    "spins, silent": "import os\nos.closerange(0, 64)\nwhile True:\n    pass",
    "sleeps": "import time\ntime.sleep(10**6)",
    "sleeps in a thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(10**6,)).start()",
    "waits for more input": "import sys\nwhile True:\n    sys.stdin.readline()",
}  # fmt: skip


SLOW = (
    "system", "exec", "kill the group", "makes a folder", "removes a tree", "truncates", "network by urllib",
    "memory, slowly", "threads", "errors", "recursion", "a large number", "spins, silent", "sleeps in a thread",
    "waits for more input",
)  # fmt: skip


@pytest.fixture(scope="module")
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        yield server


@pytest.mark.parametrize("tests", [SIX, pytest.param(CALLS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in HOSTILE])
def test_hostile_programs_end_and_touch_nothing(name, tests, tmp_path, listener):
    outside, kept = tmp_path / "outside", tmp_path / "kept" / "file"
    kept.parent.mkdir()
    kept.write_text("here")
    code = HOSTILE[name].format(outside=str(outside), kept=str(kept), port=listener.getsockname()[1])
    limits = CodeTests(allow=True, seconds=0.2, memory_mb=256, file_mb=1)
    start = time.monotonic()
    found, detail = verdict(code + "\ndef f(x):\n    return 2 * x\nprint(6)" * (tests is SIX), tests, limits)
    assert found in ("wrong", "timeout"), detail
    assert time.monotonic() - start < 15
    assert not outside.exists()
    assert kept.read_text() == "here"
    assert kept.stat().st_mode & 0o777 != 0
    with pytest.raises(TimeoutError):
        listener.accept()
    late = ("spins", "spins, deaf", "spins, silent", "sleeps", "sleeps in a thread", "waits for more input", "errors")
    if name in late and (tests is SIX or name != "sleeps in a thread"):
        assert found == "timeout"
        assert detail.endswith("not done within 0.2 s")


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    """No process of the group lives on, and the folder is gone, whatever the program left in it."""
    monkeypatch.setattr(code_tests.tempfile, "tempdir", str(tmp_path))
    started: list[int] = []
    popen = subprocess.Popen

    def remember(*arguments, **named):
        process = popen(*arguments, **named)
        started.append(process.pid)
        return process

    monkeypatch.setattr(code_tests.subprocess, "Popen", remember)
    deep = "import os\nfor _ in range(90):\n    os.mkdir('d')\n    os.chdir('d')\nopen('f', 'w')\nprint(6)"
    assert verdict(deep, SIX)[0] == "correct"
    assert verdict("import time\ntime.sleep(100)", SIX, CodeTests(allow=True, seconds=0.2))[0] == "timeout"
    assert list(tmp_path.iterdir()) == []
    assert len(started) >= 2
    for group in started:
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)


def test_the_network_is_off_both_ways():
    """The hook refuses sockets everywhere; where a namespace is permitted, there is no device either."""
    assert "audit hook" in network()
    if not unshare():
        pytest.skip("a user namespace is not permitted here")
    assert "no network device" in network()
    seen = subprocess.run(
        [*unshare(), sys.executable, "-c", "import socket; print([name for _, name in socket.if_nameindex()])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert seen.stdout.strip() in ("['lo']", "[]")


def test_without_unshare_programs_run_all_the_same(monkeypatch):
    monkeypatch.setattr(code_tests, "unshare", lambda: ())
    assert "not permitted" in network()
    assert verdict("print(int(input()) * 2)", SIX)[0] == "correct"
    assert verdict("import socket; socket.socket()", SIX) == (
        "wrong", "test 1 of 1: exit 1: Refused: a program that is tested may not: socket.__new__",
    )  # fmt: skip


def test_many_threads_may_grade():
    found: dict[int, str] = {}

    def grade(number: int) -> None:
        found[number] = verdict(f"print(int(input()) * {number})", SIX)[0]

    threads = [threading.Thread(target=grade, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: "correct" if number == 2 else "wrong" for number in range(12)}


def test_a_runner_that_dies_is_an_error_not_a_verdict(monkeypatch):
    monkeypatch.setattr(code_tests, "Path", lambda _: Path("/nowhere/code_tests.py"))
    with pytest.raises(RuntimeError, match=r"died: .*No such file"):
        verdict("print(6)", SIX)
