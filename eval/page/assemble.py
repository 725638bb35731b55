"""A report from top to bottom: which sections, in which order."""

from collections.abc import Iterable
from dataclasses import replace

from eval.compare.evidence import Evidence
from eval.compare.rule import Verdict
from eval.compare.runs import Group
from eval.compare.scores import EvalSet
from eval.compare.studies import StudyResults
from eval.page import (
    charts,
    equal_accuracy_section,
    mistakes,
    sections,
    segmentation_section,
    study_sections,
    verdict_section,
)
from eval.page.document import (
    Block,
    Figure,
    Heading,
    Table,
    distinct,
)
from eval.page.gallery import gallery
from eval.page.provenance import provenance, several_origins
from eval.page.summary import summary
from eval.page.tables import comparisons, details, main_table
from ssl_vit.errors import plural


def report(
    groups: list[Group],
    eval_sets: list[EvalSet],
    dense: list[EvalSet],
    command: str,
    study: StudyResults | None = None,
    decided: tuple[Evidence, Verdict] | None = None,
) -> tuple[str, list[Block], list[Table]]:
    """Title, content, and the main tables. dense: those measured by masks; study: whose arms the runs are; decided: its
    verdict, and what that is of, if it decides. While that is incomplete, no accuracy is shown."""
    recipes = len({group.family for group in groups if not group.control})
    names = ", ".join(dict.fromkeys(eval_set.data for eval_set in [*eval_sets, *dense]))
    names = names or (study.manifest["data"] if study else "")
    blocks: list[Block] = verdict_section.blocks(*decided) if decided else []
    incomplete = decided is not None and decided[1].incomplete
    if study and incomplete:
        study, eval_sets, dense = replace(study, eval_sets=[]), [], []
    elif blocks:
        blocks.append(Heading("All arms"))
    for eval_set in eval_sets:
        deciding = study_sections.deciding_metrics(study) if study and eval_set is study.eval_set else []
        blocks += summary(eval_set, deciding)
    blocks += several_origins(groups)
    if study:
        blocks += study_sections.lacking(study) if not incomplete else []
        blocks += study_sections.primary(study) + study_sections.budgets(study)
    mains = []
    for eval_set in eval_sets:
        suffix = f": {eval_set.data} ({eval_set.split})" if len(eval_sets) > 1 else ""
        if eval_set.main:
            mains.append(main_table(eval_set))
            blocks += [Heading(f"Accuracy{suffix}"), charts.at_a_glance(eval_set), mains[-1]]
        blocks += details(eval_set) + comparisons(eval_set, suffix)
        if study and eval_set is study.eval_set:
            blocks += equal_accuracy_section.blocks(study)
        blocks += (
            charts.compute(eval_set, suffix)
            + charts.label_efficiency(eval_set, suffix)
            + charts.by_block(eval_set, suffix)
        )
        blocks += sections.robustness(eval_set, suffix) + sections.rates(eval_set) + mistakes.by_class(eval_set, suffix)
    for eval_set in dense:
        found, main = segmentation_section.blocks(eval_set)
        blocks, mains = blocks + found, [*mains, main]
    blocks += sections.difficulty(groups, eval_sets) + (study_sections.trials(study) if study else [])
    blocks += (
        charts.curves(groups, accuracies=not incomplete)
        + gallery(groups)
        + provenance(groups, [*eval_sets, *dense], command)
    )
    figures = [block for block in blocks if isinstance(block, Figure)]
    names_of_files = iter(distinct([name for figure in figures for name, _ in figure.charts]))
    for figure in figures:
        figure.charts = [(next(names_of_files), svg) for _, svg in figure.charts]
    kind = "arm" if study else "recipe"
    what = f"{plural(recipes, kind)} compared" if recipes else "Controls"
    if study and incomplete:
        ended = decided is not None and decided[1].diverged
        what = "Undecided" if ended else "Not decided"
    if study:
        what = f"{study.manifest['plan']}: {what[0].lower()}{what[1:]}"
    return f"{what} on {names}", blocks, mains


def charts_in(blocks: Iterable[Block]) -> dict[str, str]:
    """{file name without .svg: SVG text} of the charts outside collapsed parts."""
    return {name: svg for block in blocks if isinstance(block, Figure) for name, svg in block.charts}
