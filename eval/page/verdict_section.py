"""The verdict on a page: an answer in one sentence, then every condition against its thresholds."""

from collections.abc import Iterator

from eval.compare import power, rule
from eval.compare.evidence import FT10, LP10, METRICS, Contrast, Evidence
from eval.compare.rule import ALPHA, CLAIMS, MARGIN, Answer, Size, Verdict
from eval.compare.scope import Scope, scope
from eval.compare.words import number, percent
from eval.page import plots
from eval.page.document import Block, Cell, Figure, Heading, Table, Text
from ssl_vit.errors import listed

BRIEF = {rule.SMALL: "yes, but small", rule.FEATURES: "features yes"}
SHOWN = 6  # things that lack are named, and the others counted
PUBLISHED = (
    "Published orderings, to compare with and no part of the rule: noise is 11.0 points below MAE in UMD (arXiv "
    "2406.17688; ViT-B/4, 64 px, linear probe with 100 images a class, equal epochs, one seed), and 1.4 below it in "
    "l-DAE (arXiv 2401.14404; ViT-B/16, linear probe, noise in principal components of patches)."
)


def blocks(evidence: Evidence) -> list[Block]:
    """The verdict's sections of a page; the first sentence of the first block is the answer."""
    verdict = rule.decide(evidence)
    found: list[Block] = [Text(sentence(verdict, scope(evidence)), "lead")]
    if verdict.lacking:
        return found
    found += [Text(words) for words in (*_undecided(verdict), *_instrument(verdict))]
    found += [Heading("Each condition against its thresholds"), forest(verdict), table(verdict), Text(PUBLISHED)]
    return found


def sentence(verdict: Verdict, about: Scope | None) -> str:
    """The answer to the study's question, with its scope."""
    where = f" ({_scope(about)})" if about else ""
    if verdict.lacking:
        named = verdict.lacking[:SHOWN]
        more = len(verdict.lacking) - len(named)
        named += [f"{more} more"] if more else []
        return f"Not decided{where}: {listed(named)} {'is' if len(verdict.lacking) == 1 else 'are'} not measured yet."
    said = [f"{CLAIMS[claim]}: {_said(answer)}" for claim, answer in verdict.claims.items()]
    said.insert(2, f"{CLAIMS['C3']}: {_against(verdict)}")
    words = "; ".join(said)
    answer = f"{words[0].upper()}{words[1:]}{where}."
    if not verdict.failed:
        return answer
    why = [f"{check.arm} is not {check.asks}" for check in verdict.failed]
    return f"Instrument not trusted, as {listed(why)}; what follows is no verdict. {answer}"


def _said(answer: Answer) -> str:
    if answer.unplanned:
        return f"{answer.said} (no {answer.unplanned})"
    return f"{answer.said} (features yes)" if answer.said == rule.NO and answer.features else answer.said


def _against(verdict: Verdict) -> str:
    """How noise compares with MAE, at equal FLOPs and at equal images."""
    words = f"{verdict.noise.said} ({_interval(verdict.noise.contrast)} points by linear probe)"
    each = verdict.noise_per_image
    if verdict.noise.said == rule.WORSE and each:
        low, high = each.contrast.estimate.lower(ALPHA / 2), each.contrast.estimate.upper(ALPHA / 2)
        if low > -MARGIN:
            words += f", per FLOP, not per image ({_interval(each.contrast)})"
        elif high < -MARGIN:
            words += f", per FLOP and per image ({_interval(each.contrast)})"
        else:
            words += f", per FLOP; per image the size is open ({_interval(each.contrast)})"
    return words


def _interval(contrast: Contrast) -> str:
    estimate = contrast.estimate
    return f"{percent(estimate.mean, '+')}, 95 % interval {_between(contrast, ALPHA / 2, ALPHA / 2)}"


def _between(contrast: Contrast, alpha_low: float, alpha_high: float) -> str:
    estimate = contrast.estimate
    return f"{percent(estimate.lower(alpha_low), '+')} to {percent(estimate.upper(alpha_high), '+')}"


def _scope(about: Scope) -> str:
    epochs = [f"{arm} {epochs:.0f}" if epochs >= 10 else f"{arm} {epochs:.1f}" for arm, epochs in about.epochs.items()]
    height, width = about.size
    return (
        f"a ViT of {about.parameters / 1e6:.2f} M parameters; one data set, {about.data}, {about.images:,} images of "
        f"{height}×{width} px, {about.values} values a token; {number(about.budget)} FLOPs of pre-training, epochs seen: "
        f"{', '.join(epochs)}"
    )


def _undecided(verdict: Verdict) -> Iterator[str]:
    """The power that there was, of each answer that is open."""
    for claim, answer in verdict.claims.items():
        if answer.said in (rule.OPEN, rule.FEATURES):
            contrast, least = answer.weakest
            yield (
                f"{claim} is undecided. Its weakest condition is {_named(contrast)} by {contrast.metric}: a true gain "
                f"of {percent(least)} points would have been found with a power of 80 %."
            )
    if verdict.noise.said == rule.UNSIZED and verdict.instrument:
        estimate = verdict.noise.contrast.estimate
        half = estimate.half_width_at(1 - ALPHA)
        words = f"C3 is undecided: its interval is ± {percent(half)} points, against thresholds of ± {percent(MARGIN)}."
        if not rule.could_tell(verdict.instrument.estimate):
            words += " MAE is not shown to be 3 points above the autoencoder, so that equal scores need not say much."
        yield words


def _instrument(verdict: Verdict) -> Iterator[str]:
    for check in verdict.checks:
        if check.contrast is None:
            yield f"Not checked: whether {check.arm} is {check.asks}; the plan does not have it."
        else:
            mean, seeds = check.contrast.estimate.mean, check.contrast.estimate.seeds
            yield (
                f"Check of the instrument: {check.arm} must be {check.asks}; the difference is {percent(mean, '+')} "
                f"points over {seeds} seed{'s' * (seeds > 1)} ({'passed' if check.passed else 'failed'})."
            )


def _named(contrast: Contrast) -> str:
    return f"{contrast.arm} − {contrast.than}"


def _sizes(verdict: Verdict) -> list[tuple[str, Size]]:
    beside = [("", verdict.noise), ("secondary", verdict.noise_tuned), ("equal images", verdict.noise_per_image)]
    return [(note, found) for note, found in beside if found is not None]


def forest(verdict: Verdict) -> Figure:
    """A chart with a row for each condition: its interval, its thresholds, and its seeds as points."""
    rows = []
    for claim, answer in verdict.claims.items():
        said = BRIEF.get(answer.said, answer.said)
        rows.append(plots.Dot(f"{claim} {CLAIMS[claim]}: {said}"))
        count = len(answer.conditions)
        for contrast in answer.conditions:
            bounds = contrast.estimate.lower(answer.alpha), contrast.estimate.upper(ALPHA / count)
            rows.append(_dot(contrast, f"{contrast.arm} − {contrast.than} ({contrast.metric})", bounds, (0.0, MARGIN)))
        if claim == "C2":
            rows.append(plots.Dot(f"C3 {CLAIMS['C3']}: {verdict.noise.said}"))
            for note, found in _sizes(verdict):
                bounds = found.contrast.estimate.lower(ALPHA / 2), found.contrast.estimate.upper(ALPHA / 2)
                words = f"{found.contrast.metric}, {note}" if note else found.contrast.metric
                rows.append(_dot(found.contrast, f"{_named(found.contrast)} ({words})", bounds, (-MARGIN, MARGIN)))
    if verdict.instrument:
        estimate = verdict.instrument.estimate
        rows.append(plots.Dot("Could the probe tell them apart?"))
        bounds = estimate.lower(ALPHA), estimate.upper(ALPHA)
        rows.append(_dot(verdict.instrument, f"{_named(verdict.instrument)} ({LP10})", bounds, (rule.CLEAR,)))
    svg = plots.dots(rows, "The verdict", "difference in points", zero=True, brief=True)
    caption = (
        "Differences of two arms. Small points: each seed. Dashed: thresholds. C1, C2 and C4 are a YES if all left "
        "ends are above 0, and a NO if one right end is below 1.5; the bar of C3 is its 95 % interval. Filled: the bar "
        f"does not reach 0. {FT10}: {METRICS[FT10]}; {LP10}: {METRICS[LP10]}."
    )
    return Figure([("verdict", svg)], caption)


def _dot(contrast: Contrast, name: str, bounds: tuple[float, float], thresholds: tuple[float, ...]) -> plots.Dot:
    return plots.Dot(name, contrast.estimate.mean, bounds, 0, contrast.by_seed, thresholds)


def table(verdict: Verdict) -> Table:
    """A row for each condition: its difference, its bounds, what it would have detected, and what it says."""
    parts = []
    for claim, answer in verdict.claims.items():
        count, rows = len(answer.conditions), []
        for contrast in answer.conditions:
            holds = contrast.estimate.lower(answer.alpha) > 0
            fails = contrast.estimate.upper(ALPHA / count) < MARGIN
            state = {(True, False): "holds", (True, True): "holds, small", (False, True): "fails"}
            words = state.get((bool(holds), bool(fails)), "open")
            bounds = _between(contrast, answer.alpha, ALPHA / count)
            rows.append(
                _row(contrast, "", bounds, percent(rule.power.detected_by(contrast.estimate, answer.alpha)), words)
            )
        if rows:
            parts.append((f"{claim} {CLAIMS[claim]}: {_said(answer)}", rows))
        if claim == "C2":
            rows = [
                _row(found.contrast, note, _between(found.contrast, ALPHA / 2, ALPHA / 2), "", found.said)
                for note, found in _sizes(verdict)
            ]
            parts.append((f"C3 {CLAIMS['C3']}: {verdict.noise.said}", rows))
    if verdict.instrument:
        told = "yes" if rule.could_tell(verdict.instrument.estimate) else "no"
        bounds = _between(verdict.instrument, ALPHA, ALPHA)
        parts.append(("Instrument: above 3 points?", [_row(verdict.instrument, "", bounds, "", told)]))
    caption = (
        "In points. Bounds of C1, C2 and C4: one-sided, the lower at 95 % after Holm's procedure over the claims, the "
        "upper at 95 % for all conditions of its claim together; of C3: the 95 % interval. “Found from”: the true gain "
        "that would have been found with a power of 80 %."
    )
    return Table([("", ["difference", "bounds", "seeds", "found from", "condition"])], parts, caption)


def _row(contrast: Contrast, note: str, bounds: str, least: str, words: str) -> tuple[Cell, list[Cell]]:
    estimate = contrast.estimate
    cells = [percent(estimate.mean, "+"), bounds, str(estimate.seeds), least, words]
    return Cell(_named(contrast), ", ".join(filter(None, (contrast.metric, note)))), [Cell(text) for text in cells]
