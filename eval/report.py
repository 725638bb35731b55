"""One page that compares runs: tables with intervals, paired comparisons, charts, pictures and provenance.

    python eval/report.py RUN [RUN …] [--output DIR]
    python eval/report.py --study runs/PLAN-DATA     # what eval/study.py ran: arms by their names, and the verdict

On a laptop, after `./launch.sh`:

    python eval/report.py runs/*-digits*

It writes DIR/report.html (one self-contained file), DIR/report.md with its charts, DIR/*.svg, and all numbers as a
table, DIR/report.csv (columns: eval/compare/tidy.py). It trains and evaluates nothing: it reads run directories, and
the test images if they are on this machine.

Runs that differ only in their seed are one recipe. Where several test images show one patient, or are frames of one
video, they are not independent: `--cluster-by '([^/]+)_[^/]*$'` groups them by file name (patient7_scan2.png), and
intervals are over patients.
"""

import argparse
import re
import shlex
import sys
import textwrap
from pathlib import Path

import ssl_vit.own_eval  # noqa: F401  # isort: skip  before torch, and before another package called eval

from eval.compare.evidence import read
from eval.compare.rule import decide
from eval.compare.runs import group_runs, read_run
from eval.compare.scores import cluster_by, read_eval_sets
from eval.compare.studies import read_study
from eval.compare.tidy import tidy
from eval.page.assemble import charts_in, report
from eval.page.document import (
    html,
    markdown,
    terminal,
)
from ssl_vit import commands, errors, files
from ssl_vit.commands import Parser
from ssl_vit.errors import UserError


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression of the command line."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories that were evaluated")
    parser.add_argument("--study", type=Path, metavar="DIR", help="instead: the runs of a study, by its study.json")
    parser.add_argument("--output", type=Path, default=Path("runs/report"), metavar="DIR", help="default: runs/report")
    parser.add_argument(
        "--cluster-by",
        type=pattern,
        metavar="REGEX",
        help="test images whose file names have the same match (or first group) are not independent",
    )
    args = parser.parse_args()
    if bool(args.runs) == bool(args.study):
        raise UserError("Name either run directories or a study with --study, and not both.")
    command = shlex.join([*commands.documented("report"), *sys.argv[1:]])
    study = read_study(args.study) if args.study else None
    groups = study.groups if study else group_runs([read_run(folder) for folder in args.runs])
    eval_sets = study.eval_sets if study else read_eval_sets(groups)
    dense = [*read_eval_sets(groups, "mIoU"), *read_eval_sets(groups, "Jaccard")]
    if args.cluster_by:
        if study and study.manifest["decides"]:
            raise UserError(
                "The rule of a study that decides takes test images for independent: leave out --cluster-by."
            )
        cluster_by([*eval_sets, *dense], args.cluster_by)
    evidence = read(study) if study and study.manifest["decides"] else None
    decided = (evidence, decide(evidence)) if evidence else None
    title, blocks, mains = report(groups, eval_sets, dense, command, study, decided)
    old = args.output / "report.md"
    earlier = re.findall(
        r"^!\[.*\]\(([\w.-]+)\.svg\)$", old.read_text(encoding="utf-8") if old.exists() else "", re.MULTILINE
    )
    drawn = charts_in(blocks)
    for name, svg in drawn.items():
        files.write(args.output / f"{name}.svg", svg)
    files.write(args.output / "report.md", markdown(title, blocks, args.output))
    files.write(args.output / "report.html", html(title, blocks))
    # one look: a study that decides shows no accuracy before every planned run is measured
    early = decided and decided[1].incomplete
    files.write(args.output / "report.csv", tidy([] if early else [*eval_sets, *dense]))
    for name in set(earlier) - set(drawn):  # of an earlier report there
        (args.output / f"{name}.svg").unlink(missing_ok=True)
    for table in mains:
        print(f"\n{terminal(table)}\n\n{textwrap.fill(table.caption, 100)}")
    print("\nWritten: " + ", ".join(str(args.output / f"report.{kind}") for kind in ("html", "md", "csv")))


if __name__ == "__main__":
    errors.run(main)
