"""Sections of a report that only some runs have: robustness, difficulty of the task, learning rates of fine-tuning."""

import json
from dataclasses import replace

import numpy as np

from eval.compare.metrics import Metric, most
from eval.compare.runs import Group, foremost
from eval.compare.scores import EvalSet, Scores, pool_seeds
from eval.compare.words import borrowed, labels_in_words, percent, with_interval
from eval.page import charts
from eval.page.document import Block, Cell, Folded, Heading, Table, halves, named
from eval.page.tables import heads

FAMILIES = dict(noise="noise", blur="blur", other="others")


def robustness(eval_set: EvalSet, suffix: str) -> list[Block]:
    """The linear probe on corrupted test images: noise and blur separately, because some arms are trained on them."""
    every = [c for c in eval_set.scores if c.corrupted]
    if not every:
        return []
    found = [(c, said_of(eval_set, c)) for c in every if c.labels == most({c.labels for c in every})]
    blocks: list[Block] = [Heading(f"On corrupted images{suffix}")]
    for size in sorted({tuple(said["size"]) for _, said in found}):
        blocks += _of_size(eval_set, [(c, said) for c, said in found if tuple(said["size"]) == size])
    return blocks


def said_of(eval_set: EvalSet, metric: Metric) -> dict:
    """The settings of a corruption: its kind, family and severity, the size of the images (H, W), and the benchmark
    whose parameters it has."""
    said: dict = next(iter(eval_set.scores[metric].values())).rows[0]["settings"]
    return said


def _of_size(eval_set: EvalSet, found: list[tuple[Metric, dict]]) -> list[Block]:
    benchmark, (height, width) = found[0][1]["parameters"], found[0][1]["size"]
    kinds: dict[str, dict[str, list[Metric]]] = {family: {} for family in FAMILIES}
    for metric, said in found:
        kinds[said["family"]].setdefault(said["kind"], []).append(metric)
    clean = replace(found[0][0], protocol="linear-sweep")
    wanted = {"clean": [clean]} | {FAMILIES[f]: sum(of_kind.values(), []) for f, of_kind in kinds.items() if of_kind}
    single = {kind: found for of_kind in kinds.values() for kind, found in of_kind.items()}
    caption = (
        f"Accuracy in % ± half-width of the 95 % interval of the linear probe ({labels_in_words(clean.labels)}) "
        f"on corrupted test images of {height}×{width} pixels: the mean over kinds and severities 1, 3 and 5 of "
        f"Hendrycks and Dietterich (arXiv 1903.12261), with the parameters of {benchmark}, which are in pixels: "
        "accuracies at other sizes are no comparison. It is no surprise if an arm that was trained on noise or blur "
        "is robust to it. "
        f"{eval_set.floors}"
    )
    return [
        _averages(eval_set, wanted, caption),
        Folded("Each kind of corruption", [_averages(eval_set, single, "The mean over the severities.")]),
    ]


def _averages(eval_set: EvalSet, wanted: dict[str, list[Metric]], caption: str) -> Table:
    means: list[dict[Group, Scores]] = [{} for _ in wanted]
    for metrics, by_group in zip(wanted.values(), means, strict=True):
        for group in eval_set.groups:
            found = [scores for c in metrics if (scores := eval_set.scores_of(group, c)) is not None]
            alike = all((s.seeds, s.subsets) == (found[0].seeds, found[0].subsets) for s in found)
            if len(found) == len(metrics) and alike:
                rows = [row for scores in found for row in scores.rows]
                drawn = {draw: np.mean([scores.drawn[draw] for scores in found], 0) for draw in found[0].drawn}
                by_group[group] = Scores(
                    found[0].seeds,
                    np.mean([scores.correct for scores in found], 0),
                    rows,
                    drawn=drawn,
                    clusters=eval_set.clusters,
                )
        pool_seeds(by_group)
    parts: dict[bool, list] = {False: [], True: []}
    for group in eval_set.groups:
        cells = [Cell(with_interval(m[group].estimate)) if group in m else Cell() for m in means]
        if any(cell.text for title, cell in zip(wanted, cells, strict=True) if title != "clean"):
            parts[group.control].append((named(group.label), cells))
    filled = halves(parts)
    used = [scores for by_group in means for scores in by_group.values()]
    words = f"{caption} {borrowed(scores.estimate for scores in used)}".strip()
    return Table([("", list(wanted))], filled, words, charts.sources_of(used))


def difficulty(groups: list[Group], eval_sets: list[EvalSet]) -> list[Block]:
    """How hard the tasks are, easiest first, for the runs that eval/difficulty.py has measured; beside it what the
    features are worth on the first eval set, by its primary metrics."""
    found = {group: [run.folder / "difficulty.json" for run in group.runs] for group in groups}
    found = {group: there for group, files in found.items() if (there := [file for file in files if file.exists()])}
    told = {group: json.loads(found[group][0].read_text(encoding="utf-8")) for group in foremost(found)}
    if not told:
        return []
    scores = {metric: eval_set.by_group(metric) for eval_set in eval_sets[:1] for metric in eval_set.primary}
    scores = {metric: by_group for metric, by_group in scores.items() if told.keys() & by_group.keys()}
    rows = []  # of each arm its largest budget: all have the same task
    for group in sorted(told, key=lambda group: (told[group]["linear"], group.label)):
        cells = [Cell(f"{told[group][key]:.3f}") for key in ("identity", "mean_patch", "linear")]
        for by_group in scores.values():
            cells.append(Cell(with_interval(by_group[group].estimate)) if group in by_group else Cell())
        rows.append((named(group.label), cells))
    caption = (
        "Mean squared error on training images, over the patches that enter the loss, relative to the variance of the "
        "clean pixels; the error is measured against the clean pixels, whatever the run's target. The predictions are "
        "the encoder's input (with the mean patch for masked patches), the mean patch everywhere, and a linear (ridge) "
        "denoiser that sees 3×3 patches. The linear denoiser's error is what a network can still reduce and a linear "
        "filter cannot."
    )
    if scores:
        caption += f" Accuracies are in %, on {eval_sets[0].data}, {labels_in_words(eval_sets[0].labels)}."
    head = [("squared error", ["input", "mean patch", "linear"]), *heads(scores)]
    return [Heading("How hard each corruption is"), Table(head, [("", rows)], caption)]


def rates(eval_set: EvalSet) -> list[Block]:
    """The accuracy on held-out training images for each learning rate of fine-tuning, where one was chosen."""
    lines = []
    for metric in eval_set.metrics(lambda c: c.finetunes):
        for group, scores in eval_set.scores[metric].items():
            for row in scores.rows:
                tried = row.get("settings", {}).get("tried", {})
                if tried:
                    told = {rate: "diverged" if found is None else percent(found) for rate, found in tried.items()}
                    words = ", ".join(f"{rate}: {accuracy}" for rate, accuracy in told.items())
                    about = f"{group.label_in(metric)} ({metric.evaluator}, {labels_in_words(metric.labels)})"
                    lines.append((named(about, f"seed {row['seed']}"), [Cell(words)]))
    if not lines:
        return []
    caption = (
        "Accuracy in % on a tenth of the labelled training images, by learning rate; the best was used. Few labels "
        "choose at random: on 50 images the standard error is 7 points at 50 %."
    )
    return [Folded("Fine-tuning's learning rates", [Table([("", ["on held-out images"])], [("", lines)], caption)])]
