"""The verdict's section of a page: answers, scope, and every condition with its interval."""

from eval.compare.rule import ALPHA, CLAIMS, DATA, METRICS, Evidence, Verdict, decide
from eval.page.document import Block, Cell, Heading, Table, Text


def blocks(evidence: list[Evidence]) -> list[Block]:
    """The verdict's section of a page: answers, their scope, and every condition."""
    verdicts = decide(evidence)
    found: list[Block] = [Heading("Verdict")]
    for verdict in verdicts:
        arms = f", by {', '.join(verdict.winners)}" if verdict.winners else ""
        found.append(Text(f"{verdict.claim}: {verdict.answer}{arms}. {CLAIMS[verdict.claim]}", "lead"))
    found.append(Text(scope(evidence)))
    lacking = list(dict.fromkeys(f"{d}: all of it" for d in DATA if d not in {e.data for e in evidence}))
    every = [c for v in verdicts for conditions in v.arms.values() for c in conditions]
    lacking += list(dict.fromkeys(f"{c.data}: {c.lacking}" for c in every if c.lacking))
    if lacking:
        found.append(Text(f"Not measured: {'; '.join(lacking)}.", "warning"))
    return found + [table(verdict) for verdict in verdicts if verdict.arms]


def scope(evidence: list[Evidence]) -> str:
    """What a verdict covers: data, model and budget of its runs."""
    said = []
    for e in evidence:
        runs = [run for group in e.study.groups for run in group.runs if run.settings]
        if runs:
            settings = runs[0].settings
            b, size = settings["backbone"], settings["data"]["img_size"]
            images, values = settings["images"], settings["data"]["in_chans"] * b["patch_size"] ** 2
            said.append(
                f"{e.data} ({images['count']:,} images of {size[0]}×{size[1]} px, fingerprint {images['fingerprint']}, "
                f"patch size {b['patch_size']}, {values} values per patch), ViT of width {b['embed_dim']} with "
                f"{b['depth']} blocks"
            )
    budget = f"{evidence[0].budget:.2g} FLOPs of pre-training" if evidence[0].budget else "each recipe's own budget"
    return f"Scope: {'; '.join(said)}; {budget}. It implies nothing for larger images, models or budgets."


def table(verdict: Verdict) -> Table:
    """A row for each condition: the difference with its simultaneous interval, the margin, and whether it holds."""
    parts = []
    for arm, conditions in verdict.arms.items():
        rows = []
        for c in conditions:
            words = ["–", "–"]
            if c.estimate is not None:
                half = 100 * c.estimate.half_width_at(verdict.level)
                words = [f"{100 * c.estimate.mean:+.1f} ± {half:.1f}", str(c.estimate.seeds)]
            words += [f"{100 * c.margin:+.1f}", c.state(verdict.level)]
            rows.append(
                (Cell(f"{METRICS[c.metric]}, against {c.than}", c.data), [Cell(w.replace("-", "−")) for w in words])
            )
        parts.append((arm, rows))
    count = round(ALPHA / (1 - verdict.level))
    return Table(
        [("", ["difference", "seeds", "margin", "condition"])],
        parts,
        f"{verdict.claim}, in points: two-sided intervals at {100 * verdict.level:.2f} %, so that all {count} "
        "intervals of both data sets hold simultaneously at 95 %.",
    )
