"""One page that compares runs: tables with intervals, paired comparisons, charts, pictures and where it all comes from.

    python eval/report.py RUN [RUN …] [--output DIR]
    python eval/report.py --study runs/PLAN-DATA     # what eval/study.py ran: arms by their names, and the verdict

On a laptop, after `./launch.sh`:

    python eval/report.py runs/*-digits*

It writes DIR/report.html (one file that needs nothing else), DIR/report.md and its charts, DIR/*.svg, and all figures
as a table, DIR/report.csv (its columns: eval/tidy.py). It trains and evaluates nothing: all it reads are run
directories, and the test images themselves where they are on this machine.

Runs that differ in nothing but their seed are one recipe.
"""

import argparse
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from eval import charts, intervals, mistakes, sections, verdict
from eval.frames import (
    NAMES,
    Column,
    Frame,
    Group,
    Run,
    Study,
    Test,
    contrast,
    group_runs,
    ranked,
    read_run,
    read_study,
    read_tests,
)
from eval.pages import (
    Block,
    Cell,
    Code,
    Figure,
    Folded,
    Gallery,
    Heading,
    Items,
    Table,
    Text,
    html,
    markdown,
    named,
    terminal,
)
from eval.summary import summary
from eval.tidy import tidy
from eval.words import borrowed, labels_in_words, percent, with_interval
from ssl_vit import errors, files
from ssl_vit.errors import UserError

DEFINITIONS = {
    "knn-k": "k nearest training images by cosine of features centred by the training mean, weights exp(similarity / "
    "0.07). k = 20 is the primary protocol.",
    "knn-uncentred": "The same without centring: DINO's protocol.",
    "linear-sweep": "A linear classifier on frozen features; its settings, and in the column “chosen on train” the "
    "pooling too, are chosen on a held-out slice of the training images.",
    "linear-block": "The same for each block alone; the learning rate is chosen on the held-out slice.",
    "linear-mae": "A linear classifier on frozen features, trained as in the MAE paper.",
    "linear-dino": "A linear classifier on frozen features, trained as in the DINO paper.",
    "logistic": "Logistic regression on frozen features; its regularisation is chosen on a held-out slice of train.",
    "robust-": "The linear probe, trained on clean features, on corrupted test images.",
    "finetune": "All weights are trained on with labels. The random initialisation under this protocol is training "
    "from scratch. A code behind the name stands for other settings, which are never put into one column.",
}
PICTURES = dict(
    reconstruction="original, input to the encoder, and reconstruction",
    attention="attention of the class token",
    neighbours="nearest training images of test images",
    patches="PCA of patch features as RGB",
)
INTERVALS = (
    "The same test images serve every seed: seeds and images are crossed. The half-width of a 95 % interval is the "
    "hypotenuse of t times the standard error over the S seeds and 1.96 times that over the test images; a "
    "difference is taken image by image and paired by seed first. From four seeds on each arm and each difference has "
    "its own variance between seeds, and t has S − 1 degrees of freedom. Two or three seeds say too little of it (t(1) "
    "is 12.7): there it is the larger of their own and of that pooled over all arms of the column, with the pool’s "
    "degrees of freedom; an arm that is far less stable than the others then has an interval that is too narrow. With "
    "one seed only the images’ part exists. Where ± would cross 0 or 100 %, or all or none are right, the bounds are "
    "shown instead: of an accuracy Wilson’s with the seeds’ part in it, cut at 0 and 100 %. The "
    "bootstrap beside it resamples seeds and images independently, 1,000 times; with few seeds it is too narrow."
)
COMPARED = (
    "Differences on the same test images, paired by seed. “Detectable” is the smallest true difference that such a "
    "comparison finds in 80 of 100 cases; what is smaller may exist unseen. “Seeds for 1 point”: how many would find a "
    "difference of one point; “images” means that no number would, as the test images are too few. Each interval is of "
    "one comparison: of twenty true zeros about one is excluded by chance."
)
ONE_SEED = "one seed: images only"


def report(
    groups: list[Group], tests: list[Test], command: str, study: Study | None = None
) -> tuple[str, list[Block], list[Table]]:
    """Title, content, and the main tables. study: what the runs are the arms of."""
    runs = [run for group in groups for run in group.runs]
    recipes = len({group.family for group in groups if not group.control})
    names = ", ".join(dict.fromkeys(test.data for test in tests))
    blocks: list[Block] = []
    for test in tests:
        blocks += summary(test, sections.metrics(study) if study and test is study.test else [])
    blocks += sections.mixed(runs)
    if study and study.said["decides"] and study.said["data"] in verdict.DATA:
        blocks += verdict.blocks(verdict.collect([study]))
    blocks += sections.primary(study) + sections.budgets(study) if study else []
    mains = []
    for test in tests:
        of = f": {test.data} ({test.split})" if len(tests) > 1 else ""
        if test.main:
            mains.append(main_table(test))
            blocks += [Heading(f"Accuracy{of}"), charts.at_a_glance(test), mains[-1]]
        blocks += details(test) + comparisons(test, of)
        blocks += charts.compute(test, of) + charts.label_efficiency(test, of) + charts.by_block(test, of)
        blocks += sections.robustness(test, of) + sections.rates(test) + mistakes.by_class(test, of)
    blocks += sections.difficulty(groups) + (sections.trials(study) if study else [])
    blocks += charts.curves(groups) + gallery(groups) + provenance(runs, tests, command)
    kind = "arm" if study else "recipe"
    what = f"{recipes} {kind}{'s' * (recipes > 1)} compared" if recipes else "Controls"
    return f"{what} on {names}", blocks, mains


def best_of(frames: dict[Group, Frame]) -> set[Group]:
    """The best recipe beside the controls, and all that are not distinguishable from it; none if there is only one."""
    recipes = ranked(frames, controls=False)
    if len(recipes) < 2:
        return set()
    differences = {g: contrast(frames, recipes[0], g) for g in recipes[1:]}
    apart = {g for g, difference in differences.items() if difference is not None and difference.excludes_zero}
    return set(recipes) - apart


def table_rows(test: Test, columns: list[Column]) -> list[tuple[str, Group, list[Frame | None]]]:
    """(label, group, frames) of each row; the random initialisation has one more row, as what starts from scratch."""
    lines = []
    for group in test.groups:
        by_label: dict[str, list[Frame | None]] = {}
        for number, column in enumerate(columns):
            frames = by_label.setdefault(group.label_in(column), [None] * len(columns))
            frames[number] = test.frame(group, column)
        lines += [(label, group, frames) for label, frames in by_label.items() if any(frames)]
    return lines


def table(test: Test, columns: list[Column], caption: str, extra: tuple[str, list[str]] | None = None) -> Table:
    """Recipes × columns, controls under the others."""
    best = [best_of(test.in_column(column)) for column in columns]
    parts: dict[bool, list] = {False: [], True: []}
    used: list[Frame] = []
    for label, group, frames in table_rows(test, columns):
        count = len(group.runs)
        note = ONE_SEED if count == 1 else f"{count} seeds"
        cells = []
        for frame, marked in zip(frames, best, strict=True):
            fewer = frame is not None and len(frame.seeds) < count
            few = (ONE_SEED if len(frame.seeds) == 1 else f"{len(frame.seeds)} seeds") if fewer else ""
            cells.append(Cell() if frame is None else Cell(with_interval(frame.estimate), few, group in marked))
        used += filter(None, frames)
        cells += [Cell(words) for words in charts.cost_of(group)] if extra else []
        parts[group.control].append((named(label, "no seed" if group.runs[0].seed is None else note), cells))
    head: list[tuple[str, list[str]]] = []
    for column in columns:
        if not head or head[-1][0] != column.evaluator:
            head.append((column.evaluator, []))
        head[-1][1].append(column.features)
    majority = [Cell(percent(test.majority.estimate.mean))] * len(columns) + [Cell("0")] * (3 if extra else 0)
    parts[True].append((Cell("most frequent class", "always named"), majority))
    filled = [(title, rows) for title, rows in (("", parts[False]), ("Controls", parts[True])) if rows]
    caption = f"{caption} {test.floors} {borrowed(frame.estimate for frame in used)}".strip()
    return Table(head + ([extra] if extra else []), filled, caption, charts.sources_of(used))


def main_table(test: Test) -> Table:
    return table(
        test,
        test.main,
        f"Accuracy in % ± half-width of the 95 % interval on {test.data} ({test.split}, {len(test.truth):,} images), "
        f"{labels_in_words(test.labels)}, last blocks. Marked in each column: the best recipe beside the controls, and "
        "all that are not distinguishable from it; between single seeds the test images alone decide. Raw pixels have "
        "no pooling: their figure is repeated. What evaluation costs, fine-tuning above all, stands under “What it "
        "costs”.",
        ("pre-training", ["FLOPs", "images seen", "seconds"]),
    )


def details(test: Test) -> list[Block]:
    """The other ways to measure the last blocks with the most labels: more k, uncentred, what is not above."""
    columns = test.columns(lambda c: test.whole(c) and c not in test.main)
    if not columns:
        return []
    caption = "The other protocols, in % ± half-width. Conclusions rest on the primary one, not on the best of these."
    return [Folded("Every k, centred and uncentred", [table(test, columns, caption)])]


def comparisons(test: Test, of: str) -> list[Block]:
    """Each recipe against each control, paired, by the primary columns."""
    blocks: list[Block] = []
    for column in test.primary:
        frames = test.in_column(column)
        parts, drawn, every = [], [], []
        for control in ranked(frames, controls=True):
            name, lines, estimates = control.label_in(column), [], {}
            for group in ranked(frames, controls=False):
                estimate = contrast(frames, group, control)
                if estimate is not None:
                    estimates[group] = estimate
                    lines.append((named(group.label), _compared(estimate, frames[group].minus(frames[control]))))
                    every.append(estimate)
            if estimates:
                parts.append((f"against {name}", lines))
                svg = charts.against(name, estimates, column)
                drawn.append((f"{charts.file_name(test, 'against', column)}-{charts.slug(name)}", svg))
        if not parts:
            continue
        sources = charts.sources_of(frames.values())
        head = [("", ["difference ± 95 %", "bootstrap", "detectable", "seeds for 1 point", "seeds"])]
        blocks += [
            Heading(column.name, 3),
            Figure(drawn, "Hollow: not distinguishable from zero. Each chart has its own scale."),
            Table(head, parts, f"In points. {test.floors} {borrowed(every)} {charts.counted(sources)}", sources),
        ]
    return [Heading(f"Against the controls{of}"), Text(COMPARED), *blocks] if blocks else []


def _compared(estimate: intervals.Estimate, difference: np.ndarray) -> list[Cell]:
    seeds = "1: images only" if estimate.images_only else str(estimate.seeds)
    bootstrap = "–"
    if estimate.seeds >= 3:
        bootstrap = " to ".join(percent(end, "+") for end in intervals.bootstrap(difference))
    needed = estimate.seeds_for_a_point
    needed = (
        "–" if estimate.images_only else "images" if needed is None else f"{needed:,}" if needed <= 1000 else "> 1,000"
    )
    words = with_interval(estimate, "+"), bootstrap, percent(estimate.detectable), needed, seeds
    return [Cell(text) for text in words]


def gallery(groups: list[Group]) -> list[Block]:
    """The pictures of each recipe's first seed, those of one kind side by side; of a study's arm those with the largest
    budget."""
    kinds: dict[str, list[tuple[Path, str]]] = {}
    for group in sorted((g for g in groups if not g.lesser), key=lambda g: (g.control, g.label)):
        for file in sorted((group.runs[0].folder / "pictures").glob("*.png")):
            kind, task = _shows(file.stem)
            kinds.setdefault(kind, []).append((file, f"{group.label}{task}: {kind}"))
    blocks: list[Block] = [Heading("Pictures"), Text("Of the first seed of each recipe.")] if kinds else []
    for kind, pictures in sorted(kinds.items()):
        blocks += [Heading(kind[0].upper() + kind[1:], 3), Gallery(pictures)]
    return blocks


def _shows(stem: str) -> tuple[str, str]:
    """(what a picture of this name shows, of which task of several)."""
    data, _, kind = stem.rpartition("-")
    if data and kind in PICTURES:
        return f"{data}: {PICTURES[kind]}", ""
    task, _, kind = stem.rpartition("_")
    return PICTURES.get(kind, stem), f" ({task})" if task and kind in PICTURES else ""


def provenance(runs: list[Run], tests: list[Test], command: str) -> list[Block]:
    """How to make the page again, what the protocols are, and which code made the rows."""
    protocols = {column.protocol for test in tests for column in test.frames}
    # the longest name that a protocol begins with defines it
    used = {max((start for start in DEFINITIONS if p.startswith(start)), key=len, default=None) for p in protocols}
    definitions = [(_defined(start), words) for start, words in DEFINITIONS.items() if start in used]
    for test in tests:
        for column in test.columns(lambda c: c.finetunes):
            row = next(iter(test.frames[column].values())).rows[0]
            changed = ", ".join(f"{key}={value}" for key, value in row.get("settings", {}).get("changed", {}).items())
            definitions += [(column.evaluator, f"The recipe finetune with {changed}.")] if changed else []
    definitions = list(dict.fromkeys(definitions))
    made: dict[tuple, set[str]] = {}
    for run in runs:
        for row in run.rows:
            versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
            made.setdefault((row["commit"] or "no commit recorded", versions), set()).add(run.folder.name)
    return [
        Heading("Where it comes from"),
        Text("This page is made by the command"),
        Code(command),
        Text(
            "from the rows in results.jsonl of these run directories and the predictions beside them. The HTML page "
            "lists under each table and chart the rows behind it. A figure is the share of test images whose class was "
            "predicted."
        ),
        Heading("The protocols", 3),
        Items(definitions),
        Heading("The intervals", 3),
        Text(INTERVALS),
        Heading("The code behind the rows", 3),
        Items([(commit, f"{versions}. Runs: {', '.join(sorted(of))}") for (commit, versions), of in made.items()]),
    ]


def _defined(start: str) -> str:
    return {"knn-k": "k-NN", "knn-uncentred": "k-NN, uncentred"}.get(start) or NAMES[start]


def charts_in(blocks: Iterable[Block]) -> dict[str, str]:
    """{file name without .svg: SVG text} of the charts that are not folded away."""
    return {name: svg for block in blocks if isinstance(block, Figure) for name, svg in block.charts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories that were evaluated")
    parser.add_argument("--study", type=Path, metavar="DIR", help="instead: the runs of a study, by its study.json")
    parser.add_argument("--output", type=Path, default=Path("runs/report"), metavar="DIR", help="default: runs/report")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.study):
        raise UserError("Name run directories, or a study with --study, and not both.")
    command = shlex.join(["python", "eval/report.py", *sys.argv[1:]])
    study = read_study(args.study) if args.study else None
    groups = study.groups if study else group_runs([read_run(folder) for folder in args.runs])
    tests = study.tests if study else read_tests(groups)
    title, blocks, mains = report(groups, tests, command, study)
    old = args.output / "report.md"
    earlier = re.findall(r"^!\[.*\]\(([\w.-]+)\.svg\)$", old.read_text() if old.exists() else "", re.MULTILINE)
    drawn = charts_in(blocks)
    for name, svg in drawn.items():
        files.write(args.output / f"{name}.svg", svg)
    files.write(args.output / "report.md", markdown(title, blocks, args.output))
    files.write(args.output / "report.html", html(title, blocks))
    files.write(args.output / "report.csv", tidy(tests))
    for name in set(earlier) - set(drawn):  # of an earlier report there
        (args.output / f"{name}.svg").unlink(missing_ok=True)
    for table in mains:
        print(f"\n{terminal(table)}\n\n{textwrap.fill(table.caption, 100)}")
    print("\nWritten: " + ", ".join(str(args.output / f"report.{kind}") for kind in ("html", "md", "csv")))


if __name__ == "__main__":
    errors.run(main)
