"""`python -m kdfast reproduce|paper|release|verify|efficiency|status|cache|doctor`: what the Makefile's targets call."""

import argparse
import sys
from pathlib import Path

from kdfast.core.errors import KdfastError
from kdfast.study import snakemake
from kdfast.study.plan import RESULTS, released


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kdfast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in {
        "reproduce": "train what is missing of a study, analyse your runs, build build/<study>/paper.pdf",
        "paper": "build build/paper.pdf from the released records; trains nothing",
        "release": "copy your records of a study to experiments/results/<study>/",
        "verify": "rerun a random cell of a released study and compare it with what was released",
        "efficiency": "measure speed, memory and size of a study's networks and exported students",
        "status": "list a study's runs as done, stale (made by other code), of other data, failed or missing",
        "doctor": "check every record, its files, checkpoints and cached teacher outputs; names what is damaged",
        "cache": "list the cached teacher outputs",
    }.items():
        command = commands.add_parser(name, help=what, description=what)
        if name == "cache":
            command.add_argument("--clear", action="store_true", help="remove it; runs compute anew what they need")
            continue
        if name == "doctor":
            command.add_argument("--all", action="store_true", help="evaluate the weights of all runs, not of a few")
            continue
        command.add_argument("--study", default="" if name == "paper" else "digits")
        if name == "reproduce":
            command.add_argument("--rerun", action="store_true", help="retrain the runs that are stale or of other data")
            command.add_argument("--profile", default="", help="where the runs go: a folder in experiments/profiles, or a path")
        if name == "verify":
            command.add_argument("--run", default="", help="id of the run; default: one at random")
            command.add_argument("--n", type=int, default=1, help="how many runs, drawn at random")
        if name == "efficiency":
            command.add_argument("options", nargs="*", help="further arguments for python -m kdfast.deploy.profiling, after --")
        if name in ("reproduce", "paper"):
            command.add_argument("snakemake", nargs="*", help="further arguments for snakemake, after --")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except KdfastError as error:
        print(f"kdfast: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    if args.command == "status":
        snakemake.show_status(args.study)
        return 0
    if args.command == "doctor":
        from kdfast.study.doctor import SAMPLE, examine

        return examine(None if args.all else SAMPLE)
    if args.command == "cache":
        snakemake.show_cache(args.clear)
        return 0
    if args.command == "verify":
        from kdfast.study.verify import verify

        verdicts = [verify(args.study, args.run) for _ in range(args.n)]
        return 0 if all(verdict.ok for verdict in verdicts) else 1
    if args.command == "efficiency":
        from kdfast.study.measuring import measure_study

        with snakemake.alone():
            measure_study(args.study, args.options)
        return 0
    if args.command == "release":
        print(f"{snakemake.release(args.study)} records copied to {RESULTS / args.study}: commit them")
        return 0
    if args.command == "paper":
        return _built(snakemake.snakemake([args.study] if args.study else released(), "released", args.snakemake),
                      "build/paper.pdf")  # fmt: skip
    if args.rerun:
        print(f"{snakemake.forget_outdated(args.study)} stale runs will be trained again")
    return _built(snakemake.snakemake([args.study], "runs", args.snakemake, args.profile), f"build/{args.study}/paper.pdf")


def _built(code: int, pdf: str) -> int:
    if code == 0 and Path(pdf).is_file():  # it is not asked for with `-- --until run`
        print(pdf)
    return code


if __name__ == "__main__":
    sys.exit(main())
