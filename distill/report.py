"""The report of a run: a table for the terminal, report.json, report.md, and report.html, a page that stands alone.

`report_data.py` counts, `report_tables.py` words it, `report_page.py` and `charts.py` draw the page.
"""

import json
from typing import Any

from distill.report_data import gather
from distill.report_page import page
from distill.report_tables import (
    Report,
    cost_rows,
    difference_rows,
    domain_rows,
    funnel_rows,
    headline,
    notes,
    provenance_rows,
    score_rows,
    source_rows,
    student_rows,
)
from distill.report_traces import shown_traces
from distill.run_dir import RunDir, replacing, write_json
from distill.scores import ALL
from eval.report import markdown_table, text_table

REPORT_JSON, REPORT_MD, REPORT_HTML = "report.json", "report.md", "report.html"


def write(run: RunDir) -> dict[str, Any]:
    """Writes report.json, report.md and report.html, and gives back what `gather` does, raising what it raises."""
    report = gather(run)
    traces, total = shown_traces(run, [line["stage"] for line in report["funnel"]], report["seed"])
    write_json(run / REPORT_JSON, report)
    for name, content in ((REPORT_MD, markdown(report)), (REPORT_HTML, page(report, traces, total))):
        with replacing(run / name) as part:
            part.write_text(content, encoding="utf-8", errors="backslashreplace")
    return report


def summary(run: RunDir) -> str:
    """What the terminal shows at the end of a run: of several tasks, their mean; report.md has each."""
    report = gather(run)
    report |= {
        name: [one for one in report[name] if one["task"] == ALL] or report[name] for name in ("scores", "differences")
    }
    parts = [text_table(funnel_rows(report), left=(0, 1, 4))] if report["funnel"] else []
    parts += [text_table(score_rows(report))] if report["scores"] else []
    parts += [text_table(difference_rows(report))] if report["differences"] else []
    parts += ["\n".join(f"- {line}" for line in notes(report))] if notes(report) else []
    return "\n\n".join([f"{report['name']}: {headline(report)}", *parts, f"{run / REPORT_HTML} shows all of it"])


def markdown(report: Report) -> str:
    """report.md: the tables of the page."""
    sections = [
        ("Scores", score_rows), ("Paired differences", difference_rows), ("Stages", funnel_rows),
        ("Problems by pass rate", source_rows), ("Dataset", domain_rows), ("Students", student_rows),
        ("Cost", cost_rows), ("Provenance", provenance_rows),
    ]  # fmt: skip
    parts = [f"# {report['name']}", report["description"], f"{headline(report)}."]
    parts.append("\n".join(f"- {line}" for line in notes(report)))
    for title, rows_of in sections:
        if len(rows := rows_of(report)) > 1:
            parts += [f"## {title}", markdown_table(rows)]
    recipe = json.dumps(report["recipe"], ensure_ascii=False, indent=1, sort_keys=True)
    parts += ["## Recipe", f"````json\n{recipe}\n````"]
    return "\n\n".join(part for part in parts if part) + "\n"
