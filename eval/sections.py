"""Sections of a report that only some runs have: mixed origins, robustness, how hard a task is, a study's trials."""

import json
from dataclasses import replace

import numpy as np

from eval import charts, intervals, plans
from eval.frames import PRIMARY, Column, Frame, Group, Run, Study, Test, contrast, most, pool_seeds
from eval.pages import Block, Cell, Folded, Heading, Table, Text, named
from eval.words import borrowed, labels_in_words, number, percent, with_interval

FAMILIES = dict(noise="noise", blur="blur", other="others")
CHANGES = {  # what a plan's fine-tunings of one arm differ in
    "optim.layer_decay": "layer decay",
    "backbone.drop_path": "drop path",
    "objective.noise": "noise as augmentation",
    "objective.drop": "dropped patches as augmentation",
}


def mixed(runs: list[Run]) -> list[Block]:
    """A warning where the rows come from several states of the code, its packages or the recipe of fine-tuning."""
    rows = [row for run in runs for row in run.rows]
    recipes = {row.get("settings", {}).get("recipe") for row in rows if row["protocol"].startswith("finetune")}
    swept = [row.get("settings", {}) for row in rows if row["protocol"] in ("linear-sweep", "linear-block")]
    grids = {json.dumps(settings.get("rates")) for settings in swept if "tried" in settings}
    several = [
        f"{len(found)} {name}"
        for name, found in (
            ("commits of this code", {row["commit"] for row in rows}),
            ("sets of package versions", {json.dumps(row["versions"], sort_keys=True) for row in rows}),
            ("states of the recipe finetune", recipes),
            ("grids of learning rates of the linear sweep", grids),
        )
        if len(found) > 1
    ]
    if not several:
        return []
    return [Text(f"These rows were made by {' and '.join(several)}; results.jsonl of each run tells which.", "warning")]


def metrics(study: Study) -> list[Column]:
    """The primary columns that a study's arms are compared by with their controls, one by one.

    Not fine-tuning where there are several from scratch: the best of those is the opponent, which the verdict finds.
    """
    arms = study.said["arms"].values()
    if study.test is None or not any(arm["role"] for arm in arms):
        return []
    several = any(len(arm["finetuned"]) > 1 for arm in arms if arm["role"] == "scratch")
    return [c for c in study.test.primary if c.protocol != PRIMARY and not (c.finetunes and several)]


def primary(study: Study) -> list[Block]:
    """The metrics that a study decides by, for each arm, with what is trained from scratch for as long beside it."""
    test = study.test
    if test is None:
        return []
    budget = study.budgets[-1] if study.budgets else None
    parts: dict[bool, list] = {False: [], True: []}
    used: list[Frame] = []
    for arm, said in study.said["arms"].items():
        group = study.group(arm, budget)
        lines = _lines(test, group, said["finetuned"]) if group else {}
        for name, frames in sorted(lines.items(), key=lambda line: line[1][2] is None):
            label = f"{group.family} ({name})" if name and group.recipe != "random" else name or group.family
            cells = [Cell(with_interval(f.estimate)) if f else Cell() for f in frames]
            count = len(group.runs)
            parts[group.control].append((named(label, f"{count} seed{'s' * (count > 1)}"), cells))
            used += filter(None, frames)
    filled = [(title, rows) for title, rows in (("", parts[False]), ("Controls", parts[True])) if rows]
    names = ["fine-tuned, 10 % of the labels", "fine-tuned, all", f"linear, {labels_in_words(test.labels)}"]
    there = [i for i in range(3) if any(cells[i].text for _, rows in filled for _, cells in rows)]
    if not there:
        return []
    filled = [(title, [(name, [cells[i] for i in there]) for name, cells in rows]) for title, rows in filled]
    head = [("", [names[i] for i in there])]
    at = f" after {number(budget)} FLOPs of pre-training" if budget else ""
    caption = f"Accuracy in % ± half-width of the 95 % interval{at}. {test.floors} "
    caption = (caption + borrowed(f.estimate for f in used)).strip()
    if there != [2]:
        caption += (
            " From scratch is the random initialisation, fine-tuned alike; with the compute of pre-training on top it "
            "is trained for so many FLOPs more."
        )
    return [Heading("The arms"), Table(head, filled, caption, charts.sources_of(used))]


def _lines(test: Test, group: Group, finetuned: list[dict]) -> dict[str, list[Frame | None]]:
    """What an arm reached: [fine-tuned with 10 %, with all, linear], by what sets its way of fine-tuning apart."""
    lines: dict[str, list[Frame | None]] = {}
    for place, part in enumerate((0.1, 1.0)):
        for what in finetuned:
            frame = test.reached(group, what["protocol"], part)
            if frame:
                lines.setdefault(_schedule(what["changed"], group.recipe == "random"), [None] * 3)[place] = frame
    linear = test.frames.get(Column("linear-sweep", "chosen", -1, test.labels), {}).get(group)
    if linear:
        first = group.label if group.recipe == "random" else next(iter(lines), "")
        lines.setdefault(first, [None] * 3)[2] = linear
    return lines


def _schedule(changed: dict, scratch: bool) -> str:
    """What sets a fine-tuning apart from others of its arm, in words."""
    words = ["from scratch"] if scratch else []
    words += ["with the compute of pre-training on top"] if "extra_flops" in changed else []
    words += [f"{name} {changed[key]}" for key, name in CHANGES.items() if key in changed]
    rate = changed.get("optim.lr")
    return ", ".join(words + ([f"rate {rate:g}"] if isinstance(rate, float) else []))


def budgets(study: Study) -> list[Block]:
    """What each arm gains over its controls at each budget, where there are several."""
    test, spent, arms = study.test, study.budgets, study.said["arms"]
    if test is None or len(spent) < 2:
        return []
    controls = [arm for arm in arms if arms[arm]["role"] in ("scratch", "autoencoder")]
    blocks: list[Block] = []
    for column in [c for c in test.primary if not c.finetunes or c in metrics(study)]:
        frames, head, used = test.in_column(column), [], []
        found: list[intervals.Estimate] = []
        rows: dict[str, list[Cell]] = {arm: [] for arm in arms if arms[arm]["role"] != "scratch"}
        for control in controls:
            beside = [study.group(control, budget) for budget in spent]
            if not any(other in frames for other in beside):
                continue
            name = next(other for other in beside if other in frames)
            head.append((f"against {name.label_in(column) if name.recipe == 'random' else control}", spent))
            for arm, cells in rows.items():
                for budget, other in zip(spent, beside, strict=True):
                    group, difference = study.group(arm, budget), None
                    if group in frames and other in frames and arm != control:
                        difference = contrast(frames, group, other)
                        used += [frames[group], frames[other]]
                        found += [difference] if difference else []
                    cells.append(Cell() if difference is None else _gain(difference))
        filled = [(Cell(arm), cells) for arm, cells in rows.items() if any(cell.text for cell in cells)]
        if filled:
            head = [(name, [number(budget) for budget in at]) for name, at in head]
            caption = "Difference in points ± half-width of the 95 % interval, by FLOPs of pre-training. "
            caption += borrowed(found)
            blocks.append(Heading(column.name, 3))
            blocks.append(Table(head, [("", filled)], caption, list(dict.fromkeys(charts.sources_of(used)))))
    words = (
        "Each budget is a full schedule of its own. Differences are paired by test image and seed, at equal budgets."
    )
    return [Heading("At each budget"), Text(words), *blocks] if blocks else []


def _gain(estimate: intervals.Estimate) -> Cell:
    return Cell(with_interval(estimate, "+"), "one seed: images only" if estimate.images_only else "")


def robustness(test: Test, of: str) -> list[Block]:
    """The linear probe on corrupted test images: noise and blur apart, as some arms are trained on them."""
    every = [c for c in test.frames if c.corrupted]
    if not every:
        return []
    columns = [c for c in every if c.labels == most({c.labels for c in every})]
    kinds: dict[str, dict[str, list[Column]]] = {family: {} for family in FAMILIES}
    for column in columns:
        said = next(iter(test.frames[column].values())).rows[0]["settings"]
        kinds[said["family"]].setdefault(said["kind"], []).append(column)
    clean = replace(columns[0], protocol="linear-sweep")
    wanted = {"clean": [clean]} | {FAMILIES[f]: sum(of_kind.values(), []) for f, of_kind in kinds.items() if of_kind}
    single = {kind: found for of_kind in kinds.values() for kind, found in of_kind.items()}
    caption = (
        f"Accuracy in % ± half-width of the 95 % interval of the linear probe ({labels_in_words(clean.labels)}) "
        "on corrupted test images: the mean over kinds and severities 1, 3 and 5 of Hendrycks and Dietterich "
        "(arXiv 1903.12261). An arm that was trained on noise or blur is no surprise where it is robust to that. "
        f"{test.floors}"
    )
    return [
        Heading(f"On corrupted images{of}"),
        _averages(test, wanted, caption),
        Folded("Each kind of corruption", [_averages(test, single, "The mean over the severities.")]),
    ]


def _averages(test: Test, wanted: dict[str, list[Column]], caption: str) -> Table:
    means: list[dict[Group, Frame]] = [{} for _ in wanted]
    for columns, of in zip(wanted.values(), means, strict=True):
        for group in test.groups:
            frames = [test.frame(group, c) for c in columns]
            if None not in frames and all(f.seeds == frames[0].seeds for f in frames):
                rows = [row for frame in frames for row in frame.rows]
                of[group] = Frame(frames[0].seeds, np.mean([f.correct for f in frames], 0), rows)
        pool_seeds(of)
    parts: dict[bool, list] = {False: [], True: []}
    for group in test.groups:
        cells = [Cell(with_interval(of[group].estimate)) if group in of else Cell() for of in means]
        if any(cell.text for cell in cells):
            parts[group.control].append((named(group.label), cells))
    filled = [(title, rows) for title, rows in (("", parts[False]), ("Controls", parts[True])) if rows]
    used = [frame for of in means for frame in of.values()]
    words = f"{caption} {borrowed(frame.estimate for frame in used)}".strip()
    return Table([("", list(wanted))], filled, words, charts.sources_of(used))


def difficulty(groups: list[Group]) -> list[Block]:
    """How hard the tasks are, where eval/difficulty.py has measured it."""
    rows = []
    for group in sorted((g for g in groups if not g.lesser), key=lambda g: g.label):  # every budget has the same task
        files = [file for run in group.runs if (file := run.folder / "difficulty.json").exists()]
        if files:
            said = json.loads(files[0].read_text())
            figures = [f"{said[key]:.3f}" for key in ("identity", "mean_patch", "linear")]
            rows.append((named(group.label), [Cell(text) for text in figures]))
    if not rows:
        return []
    caption = (
        "Mean squared error over the patches that the loss counts, against the clean pixels whatever the run's target, "
        "as a share of the pixels' variance: of what the encoder is given (hidden patches as the mean patch), of the "
        "mean patch everywhere, and of a linear (ridge) denoiser that sees 3×3 patches. On training images. What is "
        "left below the last column is what a network can learn and a linear filter cannot."
    )
    return [
        Heading("How hard each corruption is"),
        Table([("", ["given", "mean patch", "linear"])], [("", rows)], caption),
    ]


def trials(study: Study) -> list[Block]:
    """Every trial of the arms' tuning, with what it reached on held-out training images."""
    parts = []
    for arm, tried in study.said["trials"].items():
        common = set.intersection(*(set(trial["settings"]) for trial in tried))
        rows = []
        for trial in sorted(tried, key=lambda t: -(t["accuracy"] or 0.0)):
            own = " ".join(text for text in trial["settings"] if text not in common)
            rows.append((Cell(own), [Cell("failed" if trial["accuracy"] is None else percent(trial["accuracy"]))]))
        parts.append((arm, rows))
    if not parts:
        return []
    tuning = study.said["tuning"]
    words = (
        f"Each arm had as many trials, at {tuning['flops']:.3g} FLOPs and seed 0, on nine tenths of the training "
        f"images; {' '.join(tuning['judge'])} judged them on the last tenth. The arm is trained with the best."
    )
    tried = {arm: [(t["settings"], t["accuracy"]) for t in of] for arm, of in study.said["trials"].items()}
    edge = [arm for arm, of in tried.items() if plans.at_the_edge(of)]
    if edge:
        words += f" At the edge of the learning rates tried, so that a better one may lie beyond: {', '.join(edge)}."
    table = Table([("", ["accuracy, %"])], parts, "On held-out training images.")
    return [Heading("How the arms were tuned"), Text(words), Folded("All trials", [table])]


def rates(test: Test) -> list[Block]:
    """What each learning rate of fine-tuning reached on held-out training images, where one was chosen."""
    lines = []
    for column in test.columns(lambda c: c.finetunes):
        for group, frame in test.frames[column].items():
            for row in frame.rows:
                tried = row.get("settings", {}).get("tried", {})
                if tried:
                    words = ", ".join(f"{rate}: {percent(accuracy)}" for rate, accuracy in tried.items())
                    about = f"{group.label_in(column)} ({column.evaluator}, {labels_in_words(column.labels)})"
                    lines.append((named(about, f"seed {row['seed']}"), [Cell(words)]))
    if not lines:
        return []
    caption = "Accuracy in % on a tenth of the labelled training images, by learning rate; the best was taken."
    return [Folded("Fine-tuning's learning rates", [Table([("", ["on held-out images"])], [("", lines)], caption)])]
