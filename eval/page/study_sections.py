"""Sections of a study's report: its arms, its budgets, and how the arms were tuned."""

from eval.compare import intervals
from eval.compare.manifest import FineTuningEntry, stated, varied
from eval.compare.metrics import PRIMARY, Metric
from eval.compare.runs import Group
from eval.compare.scores import EvalSet, Scores, contrast
from eval.compare.studies import StudyResults
from eval.compare.words import UNPAIRED, borrowed, labels_in_words, number, percent, with_interval
from eval.page import charts
from eval.page.document import Block, Cell, Folded, Heading, Table, Text, halves, named
from ssl_vit.errors import listed, plural

SHOWN = 12  # runs that lack are named, and the others counted
CHANGES = {  # settings in which a plan's fine-tunings of one arm differ
    "optim.layer_decay": "layer decay",
    "backbone.drop_path_rate": "drop path",
    "objective.noise_sigma": "noise as augmentation",
    "objective.patch_drop_rate": "dropped patches as augmentation",
}


def deciding_metrics(study: StudyResults) -> list[Metric]:
    """The primary metrics by which a study's arms are compared with each of their controls.

    Fine-tuning is left out if there are several from scratch: the verdict compares with each of them.
    """
    arms = study.manifest["arms"].values()
    if study.eval_set is None or not any(arm["role"] for arm in arms):
        return []
    several = any(len(arm["finetuned"]) > 1 for arm in arms if arm["role"] == "scratch")
    return [c for c in study.eval_set.primary if c.protocol != PRIMARY and not (c.finetunes and several)]


def lacking(study: StudyResults) -> list[Block]:
    """A warning of what a plan has and the page has not: what is left of an arm whose other seeds failed flatters
    it."""
    if not study.lacking:
        return []
    shown, more = study.lacking[:SHOWN], len(study.lacking) - SHOWN
    shown += [f"{more} more"] if more > 0 else []
    return [Text(f"The plan has runs that are not on this page: {'; '.join(shown)}.", "warning")]


def primary(study: StudyResults) -> list[Block]:
    """The metrics that a study decides by, for each arm, beside training from scratch for as long."""
    eval_set = study.eval_set
    if eval_set is None:
        return []
    budget = study.budgets[-1] if study.budgets else None
    parts: dict[bool, list] = {False: [], True: []}
    used: list[Scores] = []
    for arm, said in study.manifest["arms"].items():
        group = study.group(arm, budget)
        if group is None:
            continue
        lines = _lines(eval_set, group, said["finetuned"], budget)
        for name, by_group in sorted(lines.items(), key=lambda line: line[1][2] is None):
            label = f"{group.family} ({name})" if name and group.recipe != "random" else name or group.family
            label += f" ({said['budget']:g} of the FLOPs)" if said["budget"] != 1 else ""
            cells = [Cell(with_interval(f.estimate)) if f else Cell() for f in by_group]
            count = len(group.runs)
            parts[group.control].append((named(label, plural(count, "seed")), cells))
            used += filter(None, by_group)
    filled = halves(parts)
    names = ["fine-tuned, 10 % of the labels", "fine-tuned, all", f"linear, {labels_in_words(eval_set.labels)}"]
    there = [i for i in range(3) if any(cells[i].text for _, rows in filled for _, cells in rows)]
    if not there:
        return []
    filled = [(title, [(name, [cells[i] for i in there]) for name, cells in rows]) for title, rows in filled]
    head = [("", [names[i] for i in there])]
    at = f" after {number(budget)} FLOPs of pre-training, unless a row says otherwise" if budget else ""
    caption = f"Accuracy in % ± half-width of the 95 % interval{at}. {eval_set.floors} "
    caption = (caption + borrowed(f.estimate for f in used)).strip()
    if there != [2]:
        caption += (
            " “From scratch” is the random initialisation, fine-tuned in the same way but for layer decay, which it "
            "has only where a plan sets it; “with the compute of "
            "pre-training on top”, it is trained for that many more FLOPs."
        )
    return [Heading("The arms"), Table(head, filled, caption, charts.sources_of(used))]


def _lines(
    eval_set: EvalSet, group: Group, finetuned: list[FineTuningEntry], budget: float | None
) -> dict[str, list[Scores | None]]:
    """An arm's scores [fine-tuned with 10 %, with all, linear], by what distinguishes its fine-tunings."""
    lines: dict[str, list[Scores | None]] = {}
    parts = (0.1, 1.0)
    found = [
        (place, what, eval_set.reached(group, what["protocol"], parts[place])) for place in (0, 1) for what in finetuned
    ]
    told = [what["changed"] for _, what, scores in found if scores]
    keys = dict.fromkeys(key for changed in told for key in changed)
    differing = [key for key in keys if len({str(changed.get(key)) for changed in told}) > 1]
    for place, what, scores in found:
        if scores:
            words = _schedule(what["changed"], group.recipe == "random", budget, differing)
            lines.setdefault(words, [None] * 3)[place] = scores
    linear = eval_set.scores.get(Metric("linear-sweep", "chosen", -1, eval_set.labels), {}).get(group)
    if linear:
        first = group.label if group.recipe == "random" else next(iter(lines), "")
        lines.setdefault(first, [None] * 3)[2] = linear
    return lines


def _schedule(changed: dict, scratch: bool, budget: float | None, differing: list[str]) -> str:
    """What distinguishes a fine-tuning from others of its arm, in words. budget: FLOPs of a pre-training; differing:
    the settings in which the fine-tunings of the arm differ."""
    words = ["from scratch"] if scratch else []
    extra, rate = changed.get("extra_flops"), changed.get("optim.lr")
    if extra is not None:
        words.append(
            "with the compute of pre-training on top" if extra == budget else f"with {number(extra)} FLOPs more"
        )
    words += [f"{name} {changed[key]}" for key, name in CHANGES.items() if key in changed]
    words += [f"rate {rate:g}"] if isinstance(rate, float) else []
    known = {"extra_flops", "optim.lr", *CHANGES}
    return ", ".join(words + [f"{key}={changed[key]}" for key in differing if key in changed and key not in known])


def budgets(study: StudyResults) -> list[Block]:
    """What each arm gains over its controls at each budget, if there are several."""
    eval_set, spent, arms = study.eval_set, study.budgets, study.manifest["arms"]
    if eval_set is None or len(spent) < 2:
        return []
    controls = [arm for arm in arms if arms[arm]["role"] in ("scratch", "autoencoder")]
    blocks: list[Block] = []
    for metric in [c for c in eval_set.primary if not c.finetunes or c in deciding_metrics(study)]:
        by_group, used = eval_set.by_group(metric), []
        head: list[tuple[str, list[str]]] = []
        found: list[intervals.Estimate] = []
        rows: dict[str, list[Cell]] = {arm: [] for arm in arms if arms[arm]["role"] != "scratch"}
        for control in controls:
            beside = [study.group(control, budget) for budget in spent]
            if not any(other in by_group for other in beside):
                continue
            name = next(other for other in beside if other in by_group)
            against = name.label_in(metric) if name.recipe == "random" else control
            head.append((f"against {against}", [number(budget) for budget in spent]))
            for arm, cells in rows.items():
                for budget, other in zip(spent, beside, strict=True):
                    group = study.group(arm, budget)
                    if group not in by_group or other not in by_group or arm == control:
                        cells.append(Cell())
                        continue
                    difference = contrast(by_group, group, other)
                    used += [by_group[group], by_group[other]]
                    found += [difference] if difference else []
                    cells.append(_gain(difference) if difference else Cell("not compared", UNPAIRED))
        filled = [(Cell(arm), cells) for arm, cells in rows.items() if any(cell.text for cell in cells)]
        if filled:
            caption = "Difference in points ± half-width of the 95 % interval, by FLOPs of pre-training. "
            caption += borrowed(found)
            blocks.append(Heading(metric.name, 3))
            blocks.append(Table(head, [("", filled)], caption, list(dict.fromkeys(charts.sources_of(used)))))
    words = (
        "Each budget is a full schedule of its own. Differences are paired by test image and seed, at equal budgets."
    )
    return [Heading("At each budget"), Text(words), *blocks] if blocks else []


def _gain(estimate: intervals.Estimate) -> Cell:
    return Cell(with_interval(estimate, "+"), "one seed: images only" if estimate.images_only else "")


def trials(study: StudyResults) -> list[Block]:
    """The walk of each arm's tuning, with the accuracy of every trial on held-out training images."""
    tuning, trials_of = study.manifest["tuning"], study.manifest["trials"]
    if tuning is None or not trials_of:
        return []
    counts = sorted({min(map(len, trials_of.values())), max(map(len, trials_of.values()))})
    parts = []
    for arm, tried in trials_of.items():
        settings, keys = [stated(trial["settings"]) for trial in tried], varied(tried)
        used = stated(study.manifest["arms"][arm]["runs"][0]["settings"])
        rows = []
        for trial, own_settings in zip(tried, settings, strict=True):
            own = " ".join(f"{key}={own_settings[key]}" for key in keys if key in own_settings)
            accuracy = "failed" if trial["accuracy"] is None else percent(trial["accuracy"])
            chosen = " (chosen)" if all(own_settings.get(key) == used.get(key) for key in keys) else ""
            rows.append((Cell(own), [Cell(accuracy + chosen)]))
        parts.append((arm, rows))
    like = [f"{name} those of {arm['like']}" for name, arm in study.manifest["arms"].items() if arm["like"]]
    judge = " ".join(tuning["judge"]) + (", the mean over its poolings" if tuning["judge"][0] == "knn" else "")
    words = (
        f"Each arm was tuned by {' to '.join(map(str, counts))} {'trial' if counts[-1] == 1 else 'trials'} at "
        f"{number(tuning['flops'])} FLOPs and seed {tuning['seed']}, trained on nine tenths of the training images and "
        f"scored on the last tenth by {judge}: first each setting at the recipe's learning rate, "
        "then the best of them at twice and half that rate, and on by factors of two until the best lay between two "
        "others. The arm is then trained with the best settings."
    )
    if like:
        words += f" An arm may take another's: {listed(like)}."
    table = Table([("", ["accuracy, %"])], parts, "On held-out training images, in the order of the trials.")
    return [Heading("How the arms were tuned"), Text(words), Folded("All trials", [table])]
