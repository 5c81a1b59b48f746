"""The rows of a student, on disk as tokens and labels, and the proof of them.

    prepare(student, max_length, rows, folder)  ->  labels.json, training/tokens.arrow, training/tokens.json

Needs the tokenizer alone, no model and no accelerator, so a training on many GPUs does not wait for it. Rows come one
by one and go to disk; nothing is ever cut: a row over the length is dropped and counted, or refused.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from json import loads
from pathlib import Path
from typing import Any

from distill.chat import MASKED, Encoded, Given, Proof, control_tokens, encode, example, is_teachable, prove
from distill.dataset import Row
from distill.recipe import Student
from distill.run_dir import content_hash, fingerprint, read_json, replacing, write_json
from eval.runner import Progress
from eval.sample import Record
from eval.thinking import CLOSE, OPEN

BATCH = 64  # rows that are tokenised at once, 32k tokens each at the worst
PROVEN = 64  # rows whose labels are decoded: what can be wrong is wrong for all of a tokenizer and template


@dataclass(frozen=True, slots=True)
class Prepared(Record):
    """Rows = those of the dataset less what was dropped. `tokens` are prompts and completions, `taught_tokens` those
    with a label; `made_of` tells whether the files on disk are those of the same input."""

    rows: int
    dropped_too_long: int
    dropped_control_tokens: int
    dropped_no_answer: int
    tokens: int
    taught_tokens: int
    longest: int
    made_of: str

    def counts(self) -> dict[str, int]:
        """In = rows + dropped, for the manifest."""
        values = {name: value for name, value in asdict(self).items() if name != "made_of"}
        dropped = sum(value for name, value in values.items() if name.startswith("dropped_"))
        return {"in": self.rows + dropped, **values}


def load_tokenizer(student: Student) -> Any:
    """The tokenizer of the student, with its template and tokens where the recipe gives others.

    ValueError where it cannot be had or has no chat template.
    """
    from transformers import AddedToken, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            student.model, revision=student.revision or "main", trust_remote_code=student.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of {student.model!r} cannot be loaded: {error}") from error
    if student.chat_template is not None:
        tokenizer.chat_template = Path(student.chat_template).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise ValueError(
            f"{student.model} has no chat template, so there is no prompt to train on or to ask with; give the student "
            "a chat_template (recipes/templates has some)"
        )
    # Not special: decoding must keep the tags.
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in student.add_tokens])
    return tokenizer


def prepare(
    student: Student,
    max_length: int,
    stop_ids: frozenset[int],
    rows: Iterable[Row],
    folder: Path,
    *,
    total: int = 0,
    source: str = "",
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenises and proves the rows of a student, or finds that done; `source` names the content of `rows`, of which
    there are `total`.

    Raises:
        ValueError: where a row would be taught wrong (`chat.prove`), one is too long and `too_long` is refuse, or none
            is left.
    """
    tokenizer = tokenizer or load_tokenizer(student)
    tokens_file, counts_file = folder / "training" / "tokens.arrow", folder / "training" / "tokens.json"
    made_of = fingerprint(
        source, student.target, student.too_long, max_length, sorted(stop_ids), tokenizer.chat_template,
        _vocabulary(tokenizer),
    )  # fmt: skip
    if source and counts_file.exists() and tokens_file.exists() and (folder / "labels.json").exists():
        found = Prepared(**read_json(counts_file))
        if found.made_of == made_of:
            return found
    counts_file.unlink(missing_ok=True)
    work = _Rows(student, tokenizer, max_length, stop_ids, folder, total, progress)
    with replacing(tokens_file) as part:
        _write(part, work.kept(rows))
    if not work.rows:
        raise ValueError(
            f"no row is left to train on: {work.too_long} over max_length={max_length}, {work.control} with control "
            f"tokens in their text, {work.no_answer} without an answer"
        )
    done = Prepared(
        work.rows, work.too_long, work.control, work.no_answer, work.tokens, work.taught, work.longest, made_of
    )
    write_json(counts_file, asdict(done))
    return done


def tokens_hash(folder: Path) -> str:
    """Of the rows that `prepare` wrote."""
    return content_hash(folder / "training" / "tokens.arrow")


class _Rows:
    """Goes through the rows once, counting; the first kept ones are proven before any of them is given on."""

    def __init__(
        self,
        student: Student,
        tokenizer: Any,
        max_length: int,
        stop_ids: frozenset[int],
        folder: Path,
        total: int,
        progress: Progress | None,
    ) -> None:
        self.student, self.tokenizer, self.max_length, self.stop_ids = student, tokenizer, max_length, stop_ids
        self.folder, self.total, self.progress = folder, total, progress
        marks = {token for token in student.add_tokens if token not in (OPEN, CLOSE)}
        self.control_tokens = control_tokens(tokenizer) | {tokenizer.convert_tokens_to_ids(one): one for one in marks}
        self.seen = self.rows = self.too_long = self.control = self.no_answer = 0
        self.tokens = self.taught = self.longest = 0

    def kept(self, rows: Iterable[Row]) -> Iterator[Encoded]:
        rows, proof = iter(rows), None
        while batch := list(islice(rows, BATCH)):
            given = [one for one in map(self._given, batch) if one is not None]
            examples = [example(self.tokenizer, one.turns, one.thought, one.response) for one in given]
            pairs = list(zip(given, encode(self.tokenizer, examples), strict=True))
            pairs = [pair for pair in pairs if self._fits(*pair)]
            if pairs and proof is None:
                proof = self._prove(pairs[:PROVEN])
            for _, encoded in pairs:
                self.rows += 1
                self.tokens += len(encoded.input_ids)
                self.taught += sum(label != MASKED for label in encoded.labels)
                self.longest = max(self.longest, len(encoded.input_ids))
                yield encoded
            self.seen += len(batch)
            if self.progress and self.total:
                self.progress(f"{self.folder.name}: tokens", self.seen, self.total, "")

    def _given(self, row: Row) -> Given | None:
        turns = tuple(loads(row.messages))
        if self.student.target == "trace":
            return Given(row.id, turns, row.thought, row.response)
        if not row.answer:
            self.no_answer += 1
            return None
        return Given(row.id, turns, "", row.answer)

    def _fits(self, given: Given, encoded: Encoded) -> bool:
        if not is_teachable(given, encoded, self.control_tokens):
            self.control += 1
            return False
        length = len(encoded.input_ids)
        if length <= self.max_length:
            return True
        if self.student.too_long == "refuse":
            raise ValueError(
                f"row {given.id} has {length} tokens, over max_length={self.max_length}; raise sft.max_length, or set "
                "too_long: drop, which drops and counts such rows"
            )
        self.too_long += 1
        return False

    def _prove(self, pairs: list[tuple[Given, Encoded]]) -> Proof:
        proof = prove(self.tokenizer, [one for one, _ in pairs], [one for _, one in pairs], self.stop_ids)
        write_json(self.folder / "labels.json", asdict(proof))
        return proof


def _write(path: Path, rows: Iterable[Encoded]) -> None:
    """As a stream of Arrow, which `datasets` maps into memory. `length` is what batches of equal length are made by."""
    import pyarrow

    numbers = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema([("input_ids", numbers), ("labels", numbers), ("length", pyarrow.int32())])
    rows = iter(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        while chunk := list(islice(rows, BATCH)):
            columns = [
                [one.input_ids for one in chunk],
                [one.labels for one in chunk],
                [len(one.input_ids) for one in chunk],
            ]
            arrays = [pyarrow.array(column, kind.type) for column, kind in zip(columns, schema, strict=True)]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))


def _vocabulary(tokenizer: Any) -> str:
    """What decides how a text is tokenised."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return str(backend.to_str()) if backend is not None else fingerprint(tokenizer.get_vocab())
