"""The opening paragraphs of a report: what each evaluator says, and whether the evaluators agree.

from eval.page.summary import summary
summary(eval_set)     # blocks of eval.page.document, for an EvalSet of eval.compare.scores
"""

import itertools
from collections.abc import Sequence

from eval.compare import intervals
from eval.compare.metrics import Metric, most
from eval.compare.runs import Group
from eval.compare.scores import EvalSet, Scores, best_of, contrast, ranked
from eval.compare.words import UNPAIRED, labels_in_words, percent, rate, with_interval
from eval.page.document import Block, Items, Text
from ssl_vit.errors import listed, plural

PAIRS = 3  # contradictions between evaluators that are listed


def summary(eval_set: EvalSet, metrics: Sequence[Metric] = ()) -> list[Block]:
    """Which recipe is the best by each evaluator, where the evaluators disagree, and what it beats.

    metrics: those that a study decides by, which come first. Other fine-tuning is then left to the table of arms.
    """
    blocks: list[Block] = []
    if eval_set.data == "digits":
        blocks.append(
            Text("This is a smoke test: 8×8 digits show that a recipe learns, not which one is best.", "warning")
        )
    others = [c for c in eval_set.primary or eval_set.main[:1] if c not in metrics and not (metrics and c.finetunes)]
    by = {metric: eval_set.by_group(metric) for metric in [*metrics, *others]}
    by = {metric: by_group for metric, by_group in by.items() if ranked(by_group, controls=False)}
    if by:
        counts = sorted({len(scores.seeds) for found in by.values() for g, scores in found.items() if not g.control})
        seeds = plural(counts[0], "seed") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
        seeds += " per arm" if metrics else " per recipe"
        controls: dict[str, set[int]] = {}
        for group, scores in ((g, s) for found in by.values() for g, s in found.items() if g.control and not g.pixels):
            controls.setdefault(group.label, set()).add(len(scores.seeds))
        for label, some in controls.items():
            if min(some) < counts[0]:
                seeds += f", {label} {min(some)}{f' to {max(some)}' if len(some) > 1 else ''}"
        where = f"On {eval_set.data} ({eval_set.split}, {eval_set.counted}; {seeds}), "
        blocks.append(Text(f"{where}{_highest(by)}. {_agreement(by)}{eval_set.floors}", "lead"))
        beside = [(f"By {means(metric)}", _beside(eval_set, by_group, metric)) for metric, by_group in by.items()]
        blocks += [Items(said)] if (said := [(term, words) for term, words in beside if words]) else []
    recipes = [group for group in eval_set.groups if not group.control]
    shown = f"The tables show results with {labels_in_words(eval_set.labels)}"
    if lacking := [group.label for group in recipes if eval_set.labels not in eval_set.parts(group)]:
        words = f"{shown}, which {listed(lacking)} {'lacks' if len(lacking) == 1 else 'lack'}"
        blocks.append(Text(f"{words}: no part of the labels is common to all recipes."))
    elif more := [group.label for group in recipes if most(eval_set.parts(group)) != eval_set.labels]:
        blocks.append(Text(f"{shown}, which all recipes have; there are results with more labels for {listed(more)}."))
    single = [
        g.label if len(g.runs) == 1 else f"{g.label} by {means(metric)}"
        for metric, found in by.items()
        for g, scores in found.items()
        if not g.control and len(scores.seeds) == 1
    ]
    if single:
        words = f"One seed only: {listed([*dict.fromkeys(single)])}. Such an interval covers the test images, not "
        blocks.append(Text(words + "another training run."))
    return blocks


def means(metric: Metric) -> str:
    """An evaluator's name for use in a sentence after "by"."""
    return metric.name.replace("fine-tuned", "fine-tuning", 1).replace("linear,", "linear probe,", 1)


def _highest(by: dict[Metric, dict[Group, Scores]]) -> str:
    """ "mae ranks first by k-NN, with 57.2 ± 3.1 %, and by fine-tuning, with …; dino ranks first by …"."""
    reached: dict[str, list[str]] = {}
    for metric, by_group in by.items():
        first = _first(by_group)
        names = listed([group.label for group in first])
        accuracy = f"{listed(list(dict.fromkeys(with_interval(by_group[group].estimate) for group in first)))} %"
        if len(ranked(by_group, controls=False)) == 1:
            reached.setdefault(f"{names} reaches", []).append(f"{accuracy} by {means(metric)}")
        else:
            verb = "ranks first" if len(first) == 1 else "are level and rank first"
            best = best_of(by_group).difference(first)
            alike = [group.label for group in ranked(by_group, controls=False) if group in best]
            apart = f" (not distinguishable from {listed(alike)})" if alike else ""
            reached.setdefault(f"{names} {verb}", []).append(f"by {means(metric)}, with {accuracy}{apart}")
    return "; ".join(f"{said} {listed(words)}" for said, words in reached.items())


def _first(by_group: dict[Group, Scores]) -> list[Group]:
    """The recipe with the highest mean, or all that have it."""
    ranking = ranked(by_group, controls=False)
    return [group for group in ranking if by_group[group].estimate.mean == by_group[ranking[0]].estimate.mean]


def _agreement(by: dict[Metric, dict[Group, Scores]]) -> str:
    """Whether the evaluators rank the recipes alike; pairs that two of them distinguish in opposite order."""
    rankings = {metric: ranked(by_group, controls=False) for metric, by_group in by.items()}
    first, *others = rankings.values()
    common = [group for group in first if all(group in ranking for ranking in others)]
    if not others or len(common) < 2:
        return ""
    orders = {metric: [group for group in ranking if group in common] for metric, ranking in rankings.items()}
    some = any(len(ranking) > len(common) for ranking in rankings.values())
    of_all = " of those that all of them measured" if some else ""
    if len({tuple(map(id, order)) for order in orders.values()}) == 1:
        return f"The evaluators rank the recipes alike{', as far as all of them measured them' if some else ''}. "
    if not set.intersection(*(set(_first({g: by[metric][g] for g in order})) for metric, order in orders.items())):
        words = f"The evaluators disagree about the best recipe{of_all}"
    else:
        words = f"The evaluators agree on the best recipe{of_all}, and disagree about the order of the others"
    against = []
    for one, other in itertools.combinations(common, 2):
        above: dict[bool, Metric] = {}
        for metric, by_group in by.items():
            difference = contrast(by_group, one, other)
            if difference is not None and difference.excludes_zero:
                above.setdefault(difference.mean > 0, metric)
        if len(above) == 2:
            against.append(
                f"{one.label} is above {other.label} by {means(above[True])}, and below it by {means(above[False])}"
            )
    if not against:
        return f"{words}, but no two of them distinguish a pair of recipes in opposite order. "
    more = f"; and {len(against) - PAIRS} more pairs" if len(against) > PAIRS else ""
    return f"{words}: {'; '.join(against[:PAIRS])}{more}. "


def _beside(eval_set: EvalSet, by_group: dict[Group, Scores], metric: Metric) -> str:
    """The best recipe compared with the second, the controls and the most frequent class; what is not distinguishable
    from it is listed separately."""
    recipes = ranked(by_group, controls=False)
    best, clear, unclear, apart = recipes[0], [], [], []
    for other in recipes[1:2] + ranked(by_group, controls=True):
        label = other.label_in(metric).replace("from scratch", "training from scratch")
        name = f"{label} at {percent(by_group[other].estimate.mean)} %"
        estimate = contrast(by_group, best, other)
        if estimate is None:
            apart.append(name)
        elif estimate.excludes_zero:
            above = f"{'above' if estimate.mean > 0 else 'below'} {name}"
            if estimate.bounds == (estimate.mean - estimate.half_width, estimate.mean + estimate.half_width):
                clear.append(f"{percent(abs(estimate.mean))} ± {percent(estimate.half_width)} points {above}")
            else:
                clear.append(f"{above} (difference {with_interval(estimate, '+')} points)")
        else:
            unclear.append(f"{name} (difference {with_interval(estimate, '+')} points)")
    said = [f"is {listed(clear)}"] if clear else []
    said += [f"is not distinguishable from {listed(unclear)}"] if unclear else []
    said += [f"is not compared with {listed(apart)} ({UNPAIRED})"] if apart else []
    right, pool, clusters = by_group[best].correct, by_group[best].pool, by_group[best].clusters
    majority = intervals.paired(right, eval_set.majority.correct, pool, clusters)
    if majority.mean <= majority.half_width:
        is_below = majority.mean < -majority.half_width
        naming = f"always predicting the most frequent class ({rate(eval_set.majority.estimate.mean)} %)"
        said.append(f"is {'below' if is_below else 'not distinguishable from'} {naming}")
    if eval_set.unbalanced:
        said.append(f"has a balanced accuracy of {with_interval(eval_set.balanced(by_group)[best])} %")
    return f"{best.label} {'; it '.join(said)}." if said else ""
