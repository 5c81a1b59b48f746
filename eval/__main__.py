"""`deepseek-eval`, also `python -m eval`: run, report, compare, regrade, list.

Exit status: 0 done; 1 an error, and nothing more was asked; 3 finished, but some completions failed (the same command
asks for them again); 130 interrupted (the same command goes on). What is stored stays in every case.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Nothing heavy here: `--help` answers at once. Each command imports what it needs.

EXIT_ERROR, EXIT_INCOMPLETE, EXIT_INTERRUPTED = 1, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status = int(arguments.command(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of a pipe (`| head`) had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:  # OSError: ConnectionError, FileNotFoundError, BlockingIOError
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted; what was sampled is stored, and the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepseek-eval",
        description="Benchmarks by DeepSeek's published protocols, on a local model or on endpoints, with error bars.",
        epilog="exit status: 0 done, 1 error, 3 some completions failed (run again), 130 interrupted (run again)",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="ask a model, judge its answers, write the report")
    run.set_defaults(command=_run)
    _add_run_options(run)
    for command in (
        run,
        report := commands.add_parser("report", help="write report.md and report.html of a run again"),
    ):
        command.add_argument(
            "--show-questions", action="store_true", help="put confidential texts (GPQA) on the page too"
        )
        command.add_argument(
            "--reported-as",
            metavar="MODEL",
            help="whose published scores to compare with (default: the model's own name)",
        )
    report.set_defaults(command=_report)
    report.add_argument("out", type=Path, help="folder of a run")

    compare = commands.add_parser("compare", help="two runs on the same questions: paired differences")
    compare.set_defaults(command=_compare)
    compare.add_argument("a", type=Path, help="folder of a run")
    compare.add_argument("b", type=Path, help="folder of another")
    compare.add_argument("--json", action="store_true", help="as JSON")

    regrade = commands.add_parser("regrade", help="judge stored samples again, without the model, and list the flips")
    regrade.set_defaults(command=_regrade)
    regrade.add_argument("out", type=Path, help="folder of a run")

    listing = commands.add_parser("list", help="tasks, protocols, published scores")
    listing.set_defaults(command=_list)
    listing.add_argument("what", nargs="?", choices=("tasks", "protocols", "scores"), default="tasks")
    return parser


def _add_run_options(run: argparse.ArgumentParser) -> None:
    asked = run.add_argument_group("what is asked")
    asked.add_argument(
        "--model", required=True, help="Hub id or folder; with --base-url, the name that the endpoint serves"
    )
    asked.add_argument(
        "--tasks", required=True, help="comma-separated, as in mmlu,gpqa_diamond,math500 (`list` shows all)"
    )
    asked.add_argument(
        "--protocol", required=True, help="deepseek-r1, deepseek-v3-chat, deepseek-v3-base, or a .yaml file"
    )
    asked.add_argument("--out", required=True, type=Path, help="folder of samples and reports; the same one goes on")
    asked.add_argument("--data", action="append", default=[], metavar="DIR | TASK=PATH",
                       help="folder of benchmark files in their original layout, or the path for one task (repeat); "
                       "without it they come from the Hub")  # fmt: skip
    asked.add_argument("--changed-data", action="store_true", help="accept files that are not the published ones")
    asked.add_argument("--k", type=int, help="samples per question, instead of the protocol's number")
    asked.add_argument("--limit", type=int, help="only the first N questions of each task")
    asked.add_argument("--seed", type=int, default=0, help="of the sampling noise and of permuted choices (default 0)")
    asked.add_argument("--pass-at", type=_numbers, default=(), metavar="K,K", help="further pass@k to compute")
    asked.add_argument(
        "--max-tokens", type=int, help="budget of a sample; another one than the protocol's is another protocol"
    )
    asked.add_argument("--temperature", type=float, help="likewise")
    asked.add_argument("--top-p", type=float, help="likewise")
    asked.add_argument(
        "--context-length", type=int, help="where the model or endpoint does not say it, or says it wrong"
    )

    local = run.add_argument_group("a model in this process")
    local.add_argument(
        "--revision", help="branch or commit on the Hub; with --base-url, a name for what is served there"
    )
    local.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16, float16")
    local.add_argument("--device-map", help="auto, cpu, cuda:0, ...; default: the GPU where there is one")
    local.add_argument(
        "--batch-size", type=_positive, default=16, help="samples at a time (default 16); changes no sample in float32"
    )
    local.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")

    served = run.add_argument_group("endpoints")
    served.add_argument(
        "--base-url", action="append", metavar="URL", help="OpenAI-compatible, http://host:8000/v1; repeat for several"
    )
    served.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="variable that holds the key (default OPENAI_API_KEY)",
    )
    served.add_argument(
        "--concurrency", type=_positive, default=64, help="requests at a time over all endpoints (default 64)"
    )
    served.add_argument(
        "--timeout", type=float, default=1800.0, help="seconds for one attempt, the whole answer (default 1800)"
    )
    served.add_argument(
        "--retries", type=int, default=8, help="attempts after the first (default 8), further apart each"
    )
    served.add_argument(
        "--tokenizer", help="Hub id or folder: render chats here and send text, so that a thought can be opened"
    )
    served.add_argument(
        "--extra-body",
        type=_json_object,
        metavar="JSON",
        help="sent with every request; for vLLM, which else takes its own from the model's generation config: "
        '{"top_k": -1, "repetition_penalty": 1.0}',
    )
    served.add_argument(
        "--skip-preflight", action="store_true", help="do not ask whether the endpoint honours the sampling parameters"
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, such as {{"top_k": -1}}')
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, as in 4,16") from None


def _data(values: Sequence[str]) -> Path | dict[str, Path] | None:
    """`--data DIR`, or `--data TASK=PATH` any number of times."""
    named = [value.partition("=") for value in values if "=" in value]
    plain = [value for value in values if "=" not in value]
    if len(plain) > 1 or (plain and named):
        raise ValueError(f"--data {' --data '.join(values)}: give one folder for all tasks, or TASK=PATH for each")
    if named:
        return {task: Path(path) for task, _, path in named}
    return Path(plain[0]) if plain else None


def _run(arguments: argparse.Namespace) -> int:
    from eval.progress import Display
    from eval.report import REPORT_HTML, text, write_report
    from eval.runner import plan_run, run_plan

    tasks = [one.strip() for one in arguments.tasks.split(",") if one.strip()]
    overrides = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "top_p")}
    # Tasks, protocol and files before the model: loading it may take minutes.
    plan = plan_run(
        tasks, arguments.protocol,
        k=arguments.k, limit=arguments.limit, seed=arguments.seed, pass_at=arguments.pass_at, overrides=overrides,
        data=_data(arguments.data), changed_data=arguments.changed_data,
    )  # fmt: skip
    print(f"{sum(len(task.samples) for task in plan.tasks):,} questions, {plan.samples:,} samples", file=sys.stderr)
    arguments.out.mkdir(parents=True, exist_ok=True)
    sampler = _endpoint_sampler(arguments, plan) if arguments.base_url else _local_sampler(arguments)
    results = run_plan(sampler, plan, arguments.out, Display())
    write_report(arguments.out, show_questions=arguments.show_questions, model=arguments.reported_as)
    print(text(results, arguments.reported_as))
    print(f"\npage: {arguments.out / REPORT_HTML}", file=sys.stderr)
    return 0 if results.complete else EXIT_INCOMPLETE


def _local_sampler(arguments: argparse.Namespace) -> Any:
    from eval.local_sampler import TransformersSampler

    return TransformersSampler.from_pretrained(
        arguments.model,
        revision=arguments.revision,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
        trust_remote_code=arguments.trust_remote_code,
        batch_size=arguments.batch_size,
        context_length=arguments.context_length,
    )


def _endpoint_sampler(arguments: argparse.Namespace, plan: Any) -> Any:
    from eval.endpoint_sampler import EndpointSampler
    from eval.preflight import preflight

    sampler = EndpointSampler(
        arguments.base_url,
        arguments.model,
        api_key_env=arguments.api_key_env,
        concurrency=arguments.concurrency,
        timeout=arguments.timeout,
        retries=arguments.retries,
        extra_body=arguments.extra_body,
        revision=arguments.revision,
        tokenizer=arguments.tokenizer,
        context_length=arguments.context_length,
    )
    if arguments.skip_preflight:
        return sampler
    sampler.check(())  # nobody there, or another model: said at once, where the preflight would try again for minutes
    found = preflight(sampler, chat=None if any(task.settings.mode == "chat" for task in plan.tasks) else False)
    print(found, file=sys.stderr)
    (arguments.out / "preflight.json").write_text(
        json.dumps([dataclasses.asdict(one) for one in found.findings], indent=1), encoding="utf-8"
    )
    if refused := [
        f"{one.endpoint} refuses the first request: {one.detail}"
        for one in found.findings
        if one.parameter == "requests"
    ]:
        raise ValueError("; ".join(refused))
    stops = any(task.settings.mode == "completion" and task.benchmark.stop for task in plan.tasks)
    if broken := [one for one in found.serious if stops or one.parameter != "stop"]:
        raise ValueError(
            f"{', '.join(sorted({one.endpoint for one in broken}))} does not honour "
            f"{', '.join(sorted({one.parameter for one in broken}))}: the samples would not be the protocol's. Mend "
            "the server's settings, or take the samples all the same with --skip-preflight"
        )
    return sampler


def _report(arguments: argparse.Namespace) -> int:
    from eval.report import REPORT_HTML, text, write_report

    results = write_report(arguments.out, show_questions=arguments.show_questions, model=arguments.reported_as)
    print(text(results, arguments.reported_as))
    print(f"\npage: {arguments.out / REPORT_HTML}", file=sys.stderr)
    return 0 if results.complete else EXIT_INCOMPLETE


def _compare(arguments: argparse.Namespace) -> int:
    from eval.report import comparison_text
    from eval.runner import compare

    comparison = compare(arguments.a, arguments.b)
    print(json.dumps(dataclasses.asdict(comparison), indent=1) if arguments.json else comparison_text(comparison))
    return 0


def _regrade(arguments: argparse.Namespace) -> int:
    from eval.progress import Display
    from eval.report import regrade_text, write_report
    from eval.runner import regrade

    regraded = regrade(arguments.out, progress=Display())
    write_report(arguments.out)
    print(regrade_text(regraded))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from eval.report import text_table

    if arguments.what == "tasks":
        from eval.tasks import TASKS

        rows = [["task", "title", "questions", "kind", "from"]]
        rows += [[one.name, one.title, f"{one.source.rows:,}", one.kind, one.source.hub] for one in TASKS.values()]
    elif arguments.what == "protocols":
        from eval.protocols import PROTOCOLS

        rows = [["protocol", "source"], *([one.name, one.source] for one in PROTOCOLS.values())]
    else:
        from eval.published import PUBLISHED

        rows = [["model", "task", "score", "measure", "protocol", "source"]]
        rows += [[one.model, one.task, f"{one.value}", one.metric, one.protocol, one.source] for one in PUBLISHED]
    print(text_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
