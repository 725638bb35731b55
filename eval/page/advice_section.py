"""The page of eval/advise.py: the advice, every way with its cost, and accuracy against labels."""

from eval.compare.advice import Advice
from eval.compare.words import number, percent, with_interval
from eval.page import plots
from eval.page.document import Block, Cell, Code, Figure, Heading, Table, Text


def blocks(advice: Advice, data: str, command: str) -> list[Block]:
    """The page, from top to bottom."""
    ways = sorted(advice.ways, key=lambda way: -way.most.estimate.mean)
    labels = max(advice.chosen.by_labels)
    lines = []
    for way in ways:
        mean, half = advice.gain(way)
        against = "–" if way is advice.scratch else f"{percent(mean, '+')} ± {percent(half)}"
        cells = [
            with_interval(way.most.estimate),
            against,
            number(way.most.flops, power=True),
            f"{way.most.seconds:,.0f}",
        ]
        lines.append((Cell(way.name, way.how), [Cell(text, best=way is advice.chosen) for text in cells]))
    head = [("", ["accuracy", "against the best from scratch", "FLOPs", "seconds"])]
    caption = (
        f"Accuracy in % ± half-width of the 95 % interval over test images with {labels:,} labelled images. "
        f"Differences are in points and hold together: each has a level of {100 * advice.level:.3g} %. FLOPs and "
        "seconds are those of training the classifier, with the trials of its learning rate and the test images, and "
        "without the pre-training. Marked: the way that is advised, the cheapest that is not distinguishable from the "
        "best."
    )
    series = [
        plots.Series(
            f"{way.how.replace('from ', '')}: {way.name}",  # a long one is cut off at its end
            list(way.by_labels),
            [found.estimate.mean for found in way.by_labels.values()],
            [found.estimate.bounds for found in way.by_labels.values()],
            None if way.from_scratch else place,
        )
        for place, way in enumerate(ways)
    ]
    curve = plots.lines(series, "Accuracy by labels", f"{data}, %", "labelled training images", log=True)
    return [
        Text(advice.sentence, "lead"),
        Heading("The ways"),
        Table(head, [("", lines)], caption),
        Heading("With fewer labels"),
        Figure([("labels", curve)], "Bars: 95 % intervals over test images, the mean over the subsets of labels."),
        Heading("Where it comes from"),
        Text(
            "The same test images serve every way. Training from scratch is fine-tuning from a random initialisation "
            "of the backbone’s shape, without layer decay; “longer” means that the FLOPs of the run’s pre-training are "
            "added. Learning rates are chosen on a tenth of the labelled training images. This page was made by"
        ),
        Code(command),
    ]
