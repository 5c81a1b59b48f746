"""`distill`, also `python -m distill`: run, plan, status, why, report.

Exit status: 0 finished; 1 an error, and nothing is lost; 2 wrong use of the command line; 3 incomplete (a budget ended
generation, or completions failed: the same command goes on); 130 interrupted (the same command goes on).
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Nothing heavy here: `--help` answers at once. Each command imports what it needs.

EXIT_ERROR, EXIT_INCOMPLETE, EXIT_INTERRUPTED = 1, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    arguments = _parsed(argv)
    try:
        status = int(arguments.command(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of a pipe (`| head`) had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:  # OSError: ConnectionError, FileNotFoundError, a full disk
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted; what was made is kept, and the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `key=value` may stand before and after options, which argparse by itself does not allow."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [one for one in rest if one.startswith("-") or "=" not in one or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill",
        description="From one recipe to an evaluated student: traces of a teacher, verified, filtered, deduplicated, "
        "decontaminated, mixed, then fine-tuned with TRL.",
        epilog="exit status: 0 finished, 1 error, 3 incomplete (budget, failed completions: run again), "
        "130 interrupted (run again)",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe, or go on with it: what is done is not done again")
    run.set_defaults(command=_run)
    _add_recipe(run)
    run.add_argument("--dry-run", action="store_true", help="only print the plan")
    run.add_argument("--until", metavar="STAGE", help="stop after this stage (problems, prompts, traces, ..., dataset)")
    run.add_argument("--student", action="append", metavar="NAME", help="only this student (repeat for several)")
    run.add_argument(
        "--shard", metavar="I/N", type=_shard,
        help="only ask the teacher, and only part I of N of the problems (0/4 to 3/4), on any machine; put the "
        "samples.I-of-N.sqlite files into one run folder, and run there without it",
    )  # fmt: skip

    plan = commands.add_parser("plan", help="print stages, counts, tokens, hours and dollars of a recipe")
    plan.set_defaults(command=_plan)
    _add_recipe(plan)
    plan.add_argument(
        "--pilot", type=_positive, metavar="N",
        help="first ask the teacher N problems, drawn at random, to estimate from (kept, and used by the run)",
    )  # fmt: skip

    for name, command, text in (
        ("status", _status, "which stages are done, and what they counted"),
        ("report", _report, "write report.json, report.md and report.html again"),
    ):
        one = commands.add_parser(name, help=text)
        one.set_defaults(command=command)
        one.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or its recipe")

    why = commands.add_parser("why", help="the path of a problem, trace or sample through the stages")
    why.set_defaults(command=_why)
    why.add_argument("id", help="of a problem (16 hex digits) or a trace (problem/index)")
    why.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or its recipe")
    return parser


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", type=Path, help="a .yaml file; see recipes/README.md")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="as in teacher.temperature=0.8 seed=1")
    command.add_argument("--run-dir", type=Path, metavar="DIR", help="folder of the run (default runs/NAME)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1, as in 0/4")
    return int(index), int(count)


def _run(arguments: argparse.Namespace) -> int:
    from distill.pipeline import run_recipe
    from distill.recipe import PretrainRecipe, load_recipe
    from distill.run_dir import RunDir

    if arguments.dry_run:
        return _plan(arguments)
    _quiet()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run = RunDir(arguments.run_dir or Path("runs") / recipe.name)
    from eval.progress import Display

    if isinstance(recipe, PretrainRecipe):
        from distill.pretrain import run_pretrain

        if arguments.until or arguments.student or arguments.shard:
            raise ValueError("--until, --student and --shard are for recipes of kind distill")
        missing = run_pretrain(recipe, run, progress=Display(), say=_say)
        if not missing:
            print(f"the model is in {run / 'model'}")
    elif arguments.shard:
        from distill.generation import run_shard

        missing = run_shard(recipe, run, arguments.shard, Display(), _say)
    else:
        missing = run_recipe(
            recipe, run, progress=Display(), until=arguments.until, students=arguments.student, say=_say
        )
        if arguments.until is None:
            from distill.report import summary, write

            write(run)
            print(summary(run))
    if missing:
        print(f"incomplete: {missing}\nthe same command goes on from here", file=sys.stderr)
        return EXIT_INCOMPLETE
    return 0


def _quiet() -> None:
    """Bars of the libraries belong on a terminal. bitsandbytes warns, on import, of a kernel for 4-bit weights on CPU
    that nothing here needs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _plan(arguments: argparse.Namespace) -> int:
    from distill.plan import plan_text
    from distill.recipe import load_recipe
    from distill.run_dir import RunDir

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run = RunDir(arguments.run_dir or Path("runs") / recipe.name)
    if getattr(arguments, "pilot", None):
        from distill.generation import run_pilot
        from distill.recipe import PretrainRecipe
        from eval.progress import Display

        if isinstance(recipe, PretrainRecipe):
            raise ValueError("--pilot asks a teacher, and a recipe of kind pretrain has none")
        run_pilot(recipe, run, arguments.pilot, Display(), _say)
    print(plan_text(recipe, run))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from distill.status import status

    print(status(_run_of(arguments.run)))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from distill.report import summary, write

    run = _run_of(arguments.run)
    write(run)
    print(summary(run))
    return 0


def _why(arguments: argparse.Namespace) -> int:
    from distill.why import why

    print(why(_run_of(arguments.run), arguments.id))
    return 0


def _run_of(path: Path):  # -> RunDir, which is not imported for --help
    from distill.recipe import load_recipe
    from distill.run_dir import RunDir

    folder = Path("runs") / load_recipe(path).name if path.suffix in (".yaml", ".yml") else path
    if not (folder / "manifest.json").exists():
        raise FileNotFoundError(f"there is no run in {folder}: `distill run RECIPE` makes one")
    return RunDir(folder)


if __name__ == "__main__":
    sys.exit(main())
