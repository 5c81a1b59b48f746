"""A run in words and tables, which terminal, report.md and the page share: pure functions of what `gather` gives."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distill.records import REASONS
from distill.report_data import RATE_LABELS
from distill.scores import ALL
from eval.progress import duration

Report = Mapping[str, Any]
LEARNED = {"trace": "thought and answer", "answer": "the answer alone"}


# Words.


def headline(report: Report) -> str:
    """The run in one sentence, as far as it went."""
    lines = {line["stage"]: line for line in report["funnel"]}
    teacher, parts = report["recipe"]["teacher"]["model"], []
    if "prompts" in lines:
        parts.append(f"{lines['prompts']['kept']:,} prompts")
    if "traces" in lines:
        parts.append(f"{lines['traces']['in']:,} traces of {teacher}")
    if len(lines) == len(REASONS):
        parts.append(f"{lines['mix']['kept']:,} examples")
    if trained := [name for name, one in report["students"].items() if one["counts"]]:
        parts.append(f"{len(trained)} student{'s' if len(trained) > 1 else ''}")
    return " → ".join(parts) or "nothing has finished yet"


def notes(report: Report) -> list[str]:
    """What a reader must know before believing the numbers."""
    lines = [f"{stage} is incomplete: {what}" for stage, what in report["incomplete"].items()]
    if report["missing"]:
        lines.append(f"not run yet: {', '.join(report['missing'])}")
    lines += [
        f"{failed:,} samples failed; the same command asks for them again"
        for line in report["funnel"]
        if (failed := line["dropped"].get("failed"))
    ]
    lines += [
        f"{one['domain']}: {one['rows']:,} rows of the {one['wanted']:,} that the recipe asks for"
        for one in report["domains"]
        if isinstance(one["wanted"], int) and one["rows"] < one["wanted"]
    ]
    lines += [
        f"{name}: {cut:,} rows are longer than sft.max_length and were left out"
        for name, one in report["students"].items()
        if (cut := one["counts"].get("dropped_too_long"))
    ]
    lines += [f"{name}: {note}" for name, one in report["students"].items() for note in one["notes"]]
    lines += [
        f"{one['model']}: {100 * one['truncated']:.0f} % of its samples of {one['task']} were cut, or left their "
        "thought open, and count as wrong"
        for one in report["scores"]
        if one["task"] != ALL and one["truncated"] >= 0.05
    ]
    if report["traces"] and report["traces"]["unknown_length"]:
        lines.append(f"the length of {report['traces']['unknown_length']:,} traces is not known")
    return lines + report["notes"]


def words(name: str) -> str:
    return name.replace("_", " ")


def dropped(line: Mapping[str, Any]) -> str:
    return ", ".join(f"{count:,} {words(reason)}" for reason, count in line["dropped"].items()) or "-"


def percent(score: float, signed: bool = False) -> str:
    return f"{100 * score:+.1f}" if signed else f"{100 * score:.1f}"


def interval(ends: Sequence[float], signed: bool = False) -> str:
    return f"[{percent(ends[0], signed)}, {percent(ends[1], signed)}]"


def p_value(p: float) -> str:
    """Two digits; below a thousandth only that."""
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"


def short(number: float) -> str:
    """
    >>> short(61_750), short(4_309_000_000)
    ('61.8k', '4.31G')
    """
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g}{unit}"
    return f"{number:,.0f}"


def seconds(value: float) -> str:
    """As `duration`, with a digit below ten seconds."""
    return f"{value:.1f} s" if value < 9.95 else duration(value)


def optional(value: Any, form: str = ",.0f", before: str = "") -> str:
    return "-" if value is None else f"{before}{value:{form}}"


# Tables, header first.


def funnel_rows(report: Report) -> list[list[str]]:
    rows = [["stage", "judges", "in", "kept", "dropped"]]
    return rows + [
        [line["stage"], line["unit"], f"{line['in']:,}", f"{line['kept']:,}", dropped(line)]
        for line in report["funnel"]
    ]


def score_rows(report: Report) -> list[list[str]]:
    rows = [["task", "model", "pass@1", "95 % interval", "items", "k", "cut", "no answer", "tokens"]]
    for one in _by_task(report["scores"]):
        rates = [f"{100 * one[name]:.1f} %" for name in ("truncated", "no_answer")]
        rows.append(
            [one["task"], one["model"], percent(one["score"]), interval(one["interval"]), f"{one['items']:,}",
             optional(one["k"]), *rates, optional(one["tokens"])]
        )  # fmt: skip
    return rows


def difference_rows(report: Report) -> list[list[str]]:
    rows = [["task", "a - b", "points", "95 % interval", "won/lost/tied", "p"]]
    return rows + [
        [one["task"], f"{one['a']} - {one['b']}", percent(one["difference"], True), interval(one["interval"], True),
         f"{one['wins']}/{one['losses']}/{one['ties']}", p_value(one["p_value"])]
        for one in report["differences"]
    ]  # fmt: skip


def source_rows(report: Report) -> list[list[str]]:
    rows = [["source", "prompts", "asked", "solved", "samples", "right", *RATE_LABELS]]
    for one in report["sources"]:
        counts = [one[name] for name in ("prompts", "asked", "solved", "samples", "right")]
        rows.append([one["source"], *(f"{count:,}" for count in (*counts, *one["pass_rates"]))])
    return rows


def domain_rows(report: Report) -> list[list[str]]:
    rows = [["domain", "rows", "share", "tokens", "mean tokens", "before the mixture", "asked for"]]
    for one in report["domains"]:
        wanted = one["wanted"]
        asked = "-" if wanted is None else f"{wanted:,}" if isinstance(wanted, int) else f"{100 * wanted:.1f} %"
        rows.append(
            [one["domain"], f"{one['rows']:,}", f"{100 * one['share']:.1f} %", optional(one["tokens"]),
             optional(one["mean_tokens"]), f"{one['brought']:,}", asked]
        )  # fmt: skip
    return rows


def student_rows(report: Report) -> list[list[str]]:
    rows = [["student", "learns", "from", "training", "rows", "epochs", "steps", "tokens", "final loss"]]
    for name, one in report["students"].items():
        counts = [one["counts"].get(key) for key in ("rows", "epochs", "steps", "tokens")]
        loss = optional(one["counts"].get("final_loss"), ".3f")
        forms = [optional(value, ",.4g" if key == 1 else ",.0f") for key, value in enumerate(counts)]
        rows.append([name, LEARNED[one["target"]], one["model"], one["training"], *forms, loss])
    return rows


def cost_rows(report: Report) -> list[list[str]]:
    rows = [["stage", "time", "asked", "reused", "prompt tokens", "completion tokens", "dollars"]]
    keys = ("asked", "reused", "prompt_tokens", "completion_tokens")
    for one in report["costs"]:
        counts = [optional(one[key]) for key in keys]
        rows.append([one["stage"], seconds(one["seconds"]), *counts, optional(one["dollars"] or None, ".2f", "$")])
    total = totals(report)
    counts = [optional(total[key]) for key in keys]
    rows.append(["total", seconds(total["seconds"]), *counts, optional(total["dollars"] or None, ".2f", "$")])
    return rows


def totals(report: Report) -> dict[str, Any]:
    """Sums over the stages; None where no stage has one."""
    found = {}
    for name in ("seconds", "asked", "reused", "prompt_tokens", "completion_tokens", "dollars"):
        known = [one[name] for one in report["costs"] if one[name] is not None]
        found[name] = sum(known) if known else 0 if name == "seconds" else None
    return found


def provenance_rows(report: Report) -> list[list[str]]:
    recipe, values = report["recipe"], report["provenance"]
    rows = [["what", "value"], ["seed", str(report["seed"])], ["teacher", _model(recipe["teacher"])]]
    rows += [[f"student {name}", _model(one)] for name, one in (recipe.get("students") or {}).items()]
    rows += [
        [
            f"problems {name}",
            f"{one.get('dataset') or 'reasoning-gym ' + str(one.get('reasoning_gym'))}; {one['licence']}",
        ]
        for name, one in recipe["problems"].items()
    ]
    for name, value in values.items():
        flat = ", ".join(f"{key} {one}" for key, one in value.items()) if isinstance(value, Mapping) else str(value)
        rows.append([name, flat])
    return rows


def _model(settings: Mapping[str, Any]) -> str:
    return settings["model"] + (f" at {settings['revision']}" if settings.get("revision") else "")


def _by_task(scores: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All tasks together first, then task by task, the models of each in their order."""
    scores = list(scores)
    tasks = sorted(dict.fromkeys(one["task"] for one in scores), key=lambda task: task != ALL)
    return [one for task in tasks for one in scores if one["task"] == task]
