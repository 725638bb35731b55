"""The opening paragraphs of a report: what each evaluator says, and whether the evaluators agree.

from eval.summary import summary
summary(test)     # blocks of eval.pages, for a Test of eval.frames
"""

import itertools
from collections.abc import Sequence

from eval import intervals
from eval.frames import Column, Frame, Group, Test, contrast, most, ranked
from eval.pages import Block, Items, Text
from eval.words import labels_in_words, listed, percent, with_interval

PAIRS = 3  # contradictions between evaluators that are named


def summary(test: Test, metrics: Sequence[Column] = ()) -> list[Block]:
    """Which recipe is the highest by each evaluator, where they disagree, and what it is above.

    metrics: those that a study decides by, which come first; how it is fine-tuned from scratch for comparison is then
    of the arms' table, not of one column.
    """
    blocks: list[Block] = []
    if test.data == "digits":
        blocks.append(
            Text("This is a smoke test: 8×8 digits show that a recipe learns, not which one is best.", "warning")
        )
    others = [c for c in test.primary or test.main[:1] if c not in metrics and not (metrics and c.finetunes)]
    by = {column: test.in_column(column) for column in [*metrics, *others]}
    by = {column: frames for column, frames in by.items() if ranked(frames, controls=False)}
    if by:
        counts = sorted({len(g.runs) for g in test.groups if not g.control})
        seeds = f"{counts[0]} seed{'s' * (counts[0] > 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
        seeds += " per arm" if metrics else " per recipe"
        where = f"On {test.data} ({test.split}, {len(test.truth):,} images; {seeds}), "
        blocks.append(Text(f"{where}{_highest(by)}. {_agreement(by)}{test.floors}", "lead"))
        beside = [(f"By {means(column)}", _beside(test, frames, column)) for column, frames in by.items()]
        blocks += [Items(said)] if (said := [(term, words) for term, words in beside if words]) else []
    more = [g.label for g in test.groups if not g.control and most(test.parts(g)) != test.labels]
    if more:
        words = f"The tables show {labels_in_words(test.labels)}, which all have; there are figures with more of"
        blocks.append(Text(f"{words} {listed(more)}."))
    single = [g.label for g in test.groups if not g.control and len(g.runs) == 1]
    if single:
        words = f"One seed only: {listed(single)}. The interval then is of these test images, not of another training."
        blocks.append(Text(words))
    return blocks


def means(column: Column) -> str:
    """An evaluator as a sentence has it after "by"."""
    return column.name.replace("fine-tuned", "fine-tuning", 1).replace("linear,", "linear probe,", 1)


def _highest(by: dict[Column, dict[Group, Frame]]) -> str:
    """ "mae is the highest by k-NN, at 57.2 ± 3.1 %, and by fine-tuning, at …; dino is the highest by …"."""
    reached: dict[Group, list[str]] = {}
    several = False
    for column, frames in by.items():
        recipes = ranked(frames, controls=False)
        several |= len(recipes) > 1
        words = f"by {means(column)}, at {with_interval(frames[recipes[0]].estimate)} %"
        reached.setdefault(recipes[0], []).append(words)
    parts = [f"{group.label} is {'the highest ' if several else ''}{listed(words)}" for group, words in reached.items()]
    return "; ".join(parts)


def _agreement(by: dict[Column, dict[Group, Frame]]) -> str:
    """Whether the evaluators rank the recipes alike; pairs that two of them rank against each other distinguishably."""
    first = ranked(next(iter(by.values())), controls=False)
    common = [group for group in first if all(group in frames for frames in by.values())]
    if len(by) < 2 or len(common) < 2:
        return ""
    orders = {column: [g for g in ranked(frames, controls=False) if g in common] for column, frames in by.items()}
    if len({tuple(map(id, order)) for order in orders.values()}) == 1:
        return "The evaluators rank the recipes alike. "
    if len({id(order[0]) for order in orders.values()}) > 1:
        words = "The evaluators disagree about which recipe is the highest"
    else:
        words = "The evaluators agree on the highest recipe, and disagree about the order of the others"
    against = []
    for one, other in itertools.combinations(common, 2):
        above: dict[bool, Column] = {}
        for column, frames in by.items():
            difference = contrast(frames, one, other)
            if difference is not None and difference.excludes_zero:
                above.setdefault(difference.mean > 0, column)
        if len(above) == 2:
            against.append(
                f"{one.label} is above {other.label} by {means(above[True])}, and below it by {means(above[False])}"
            )
    if not against:
        return f"{words}; no two recipes are distinguishable in opposite order by two of them. "
    more = f"; and {len(against) - PAIRS} more pairs" if len(against) > PAIRS else ""
    return f"{words}: {'; '.join(against[:PAIRS])}{more}. "


def _beside(test: Test, frames: dict[Group, Frame], column: Column) -> str:
    """The best recipe beside the second, the controls and the most frequent class; what is not distinct apart."""
    recipes = ranked(frames, controls=False)
    best, clear, unclear = recipes[0], [], []
    for other in recipes[1:2] + ranked(frames, controls=True):
        label = other.label_in(column).replace("from scratch", "training from scratch")
        name = f"{label} at {percent(frames[other].estimate.mean)} %"
        estimate = contrast(frames, best, other)
        if estimate is None:
            continue  # no seed in common
        if estimate.excludes_zero:
            above = f"{'above' if estimate.mean > 0 else 'below'} {name}"
            if estimate.bounds == (estimate.mean - estimate.half_width, estimate.mean + estimate.half_width):
                clear.append(f"{percent(abs(estimate.mean))} ± {percent(estimate.half_width)} points {above}")
            else:
                clear.append(f"{above} (difference {with_interval(estimate, '+')} points)")
        else:
            unclear.append(f"{name} (difference {with_interval(estimate, '+')} points)")
    said = [f"is {listed(clear)}"] if clear else []
    said += [f"is not distinguishable from {listed(unclear)}"] if unclear else []
    majority = intervals.paired(frames[best].correct, test.majority.correct, frames[best].pool)
    if majority.mean <= majority.half_width:
        is_below = majority.mean < -majority.half_width
        naming = f"always naming the most frequent class ({percent(test.majority.estimate.mean)} %)"
        said.append(f"is {'below' if is_below else 'not distinguishable from'} {naming}")
    if test.unbalanced:
        said.append(f"has a balanced accuracy of {percent(test.balanced(frames[best]))} %")
    return f"{best.label} {'; it '.join(said)}." if said else ""
