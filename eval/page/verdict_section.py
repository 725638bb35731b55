"""The verdict on a page: an answer in one sentence, then every condition against its thresholds."""

from collections.abc import Iterator

from eval.compare import rule
from eval.compare.evidence import FT10, LABELS, LP10, METRICS, NOISE, Contrast, Evidence, level
from eval.compare.manifest import stated, varied
from eval.compare.rule import ALPHA, CLAIMS, MARGIN, Answer, Size, Verdict
from eval.compare.scope import Scope, scope
from eval.compare.words import labels_in_words, number, percent
from eval.page import plots
from eval.page.document import Block, Cell, Figure, Heading, Table, Text
from ssl_vit.errors import listed, plural

BRIEF = {rule.SMALL: "yes, but small", rule.FEATURES: "features yes"}
OPPONENTS = {"scratch": "training from scratch", "scratch-long": "training from scratch with as much compute"}
THRESHOLDS = (0.0, MARGIN, -MARGIN, rule.CLEAR, rule.CHECK)
SHOWN = 6  # things that lack are named, and the others counted
PUBLISHED = (
    "Published orderings, to compare with and no part of the rule: noise is 11.0 points below MAE in UMD (arXiv "
    "2406.17688; ViT-B/4, 64 px, linear probe with 100 images a class, equal epochs, one seed), and 1.4 below it in "
    "l-DAE (arXiv 2401.14404; ViT-B/16, linear probe, noise in principal components of patches)."
)


def blocks(evidence: Evidence, verdict: Verdict) -> list[Block]:
    """The sections of a page on the verdict from this evidence; the first sentence of the first block is the answer."""
    found: list[Block] = [Text(sentence(verdict, scope(evidence)), "lead")]
    if verdict.incomplete:
        return found
    paragraphs = (*_chosen(evidence), *_noise(evidence, verdict), *_undecided(verdict), *_instrument(verdict))
    found += [Text(words) for words in paragraphs]
    found += [Heading("Each condition against its thresholds"), forest(verdict), table(verdict), Text(PUBLISHED)]
    return found


def sentence(verdict: Verdict, about: Scope | None) -> str:
    """The answer to the study's question, with its scope."""
    where = f" ({_scope(about)})" if about else ""
    if verdict.diverged:
        return f"Undecided{where}: {verdict.diverged}."
    if verdict.lacking:
        named = verdict.lacking[:SHOWN]
        more = len(verdict.lacking) - len(named)
        named += [f"{more} more"] if more else []
        one = len(verdict.lacking) == 1 and ", seed " in verdict.lacking[0]
        return f"Not decided{where}: {'; '.join(named)} {'is' if one else 'are'} not measured yet."
    said = [f"{CLAIMS[claim]}: {_said(answer)}{_over(answer)}" for claim, answer in verdict.claims.items()]
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


def _over(answer: Answer) -> str:
    """Over what the gain is small, or too small, where a claim has several conditions; or ""."""
    small = [c for c in answer.conditions if answer.said in (rule.SMALL, rule.NO) and answer.bounds(c)[1] < MARGIN]
    if not small or len(answer.conditions) == 1:
        return ""
    others = ["random features by linear probe" if c.metric == LP10 else OPPONENTS.get(c.than, c.than) for c in small]
    if answer.said == rule.SMALL:
        return f" over {listed(others)}"
    gains = [f"over {than} is {_points(c.estimate.mean)}" for than, c in zip(others, small, strict=True)]
    return f", as the gain {listed(gains)} points (upper bound below 1.5)"


def _against(verdict: Verdict) -> str:
    """How noise compares with MAE, at equal FLOPs and at equal images."""
    words = f"{verdict.noise.said} ({_interval(verdict.noise)} points by linear probe)"
    each = verdict.noise_per_image
    if verdict.noise.said != rule.WORSE or each is None:
        return words
    low, high = each.bounds
    per_image = (
        ", not per image" if low > -MARGIN else " and per image" if high < -MARGIN else "; per image the size is open"
    )
    return f"{words}, per FLOP{per_image} ({_interval(each)})"


def _interval(size: Size) -> str:
    return f"{_points(size.contrast.estimate.mean)}, 95 % interval {_between(size.bounds)}"


def _between(bounds: tuple[float, float]) -> str:
    return f"{_points(bounds[0])} to {_points(bounds[1])}"


def _points(value: float) -> str:
    """A difference in points, in as many digits as it takes to tell it from each threshold, and in two at least."""
    value = round(value, 9)  # below are errors of rounding

    def sides(of: float) -> list[int]:
        return [(of > threshold) - (of < threshold) for threshold in THRESHOLDS]

    digits = next(digits for digits in range(2, 8) if sides(round(value, digits + 2)) == sides(value))
    return percent(value, "+", digits) if value else "0.00"


def _scope(about: Scope) -> str:
    epochs = [f"{arm} {epochs:.0f}" if epochs >= 10 else f"{arm} {epochs:.1f}" for arm, epochs in about.epochs.items()]
    height, width = about.size
    spent = f"{number(about.budget)} FLOPs of pre-training, " if about.budget else ""
    return (
        f"a ViT of {about.parameters / 1e6:.2f} M parameters; one data set, {about.data}, {about.images:,} training "
        f"and {about.tests:,} test images of {height}×{width} px, {about.values} values a token; "
        f"{labels_in_words(LABELS)}; {about.seeds} seeds; {spent}epochs seen: {', '.join(epochs)}"
    )


def _chosen(evidence: Evidence) -> Iterator[str]:
    """The settings that trials chose for each arm: which noise it is that the claims are about, above all."""
    arms = evidence.manifest["arms"]
    words = []
    for name, trials in evidence.manifest["trials"].items():
        used = stated(arms[name]["runs"][0]["settings"]) if arms[name]["runs"] else {}
        chosen = [f"{key}={used[key]}" for key in varied(trials) if key in used]
        words += [f"{name} with {' '.join(chosen)}"] if chosen else []
    if words:
        yield f"Chosen by trials at other seeds, on held-out training images: {'; '.join(words)}."
    tuned = [(name, scores.rows[0]["settings"]) for name, scores in evidence.fine_tunings() if scores.rows]
    rates = [f"{name} {said['lr']:g}" for name, said in tuned if "lr_of" in said]
    if rates:
        yield f"Learning rates of fine-tuning, chosen in the same way: {', '.join(rates)}."


def _noise(evidence: Evidence, verdict: Verdict) -> Iterator[str]:
    """Which noise it is that the claims are about, and what follows from that."""
    settings = evidence.runs(evidence.arms["noise"])[0].settings["objective"]
    words = f"The noise is Gaussian, {level(NOISE, settings['noise_sigma'])}, "
    if settings["noise_pca_dim"]:
        pixels = "" if verdict.claims["C4b"].unplanned else ", and C4b compares it with noise on pixels"
        yield (
            f"{words}in the first {settings['noise_pca_dim']} principal components of a patch. So C4a is about noise "
            f"together with what projecting the input onto them removes{pixels}. It is l-DAE's noise, not all of l-DAE."
        )
    else:
        yield f"{words}on the pixels."


def _undecided(verdict: Verdict) -> Iterator[str]:
    """The power that there was, of each answer that is open."""
    for claim, answer in verdict.claims.items():
        if answer.said in (rule.OPEN, rule.FEATURES):
            not_shown = [contrast for contrast in answer.conditions if answer.bounds(contrast)[0] <= 0]
            contrast = max(not_shown, key=answer.detectable)
            least = answer.detectable(contrast)
            yield (
                f"{claim} is {'not shown' if answer.features else 'undecided'}. The least precise of its conditions "
                f"that do not hold is {_named(contrast)} by {contrast.metric}: in it alone, a true gain of "
                f"{percent(least)} points would have been found with a power of 80 %."
            )
    if verdict.noise.said == rule.UNSIZED and verdict.instrument:
        low, high = verdict.noise.bounds
        words = f"The size of C3 is open: its 95 % interval, {_between((low, high))} points,"
        if reached := [percent(threshold, "+") for threshold in (-MARGIN, MARGIN) if low <= threshold <= high]:
            yield f"{words} contains {listed(reached)}."
        else:
            yield (
                f"{words} is within ± {percent(MARGIN)}, but MAE is not shown to be {percent(rule.CLEAR, digits=0)} "
                "points above the autoencoder, so that scores as close as these need not say much."
            )


def _instrument(verdict: Verdict) -> Iterator[str]:
    for check in verdict.checks:
        if check.contrast is None:
            yield f"Not checked: whether {check.arm} is {check.asks}; the plan does not have it."
        else:
            mean, seeds = check.contrast.estimate.mean, check.contrast.estimate.seeds
            yield (
                f"Check of the instrument: {check.arm} must be {check.asks}; the difference is {_points(mean)} "
                f"points over {plural(seeds, 'seed')} ({'passed' if check.passed else 'failed'})."
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
        rows.append(plots.Dot(f"{claim} {CLAIMS[claim]}: {BRIEF.get(answer.said, _said(answer))}"))
        for contrast in answer.conditions:
            rows.append(_dot(contrast, contrast.metric, answer.bounds(contrast), (0.0, MARGIN)))
        if claim == "C2":
            rows.append(plots.Dot(f"C3 {CLAIMS['C3']}: {verdict.noise.said}"))
            for note, found in _sizes(verdict):
                words = ", ".join(filter(None, (found.contrast.metric, note)))
                rows.append(_dot(found.contrast, words, found.bounds, (-MARGIN, MARGIN)))
    if verdict.instrument:
        rows.append(plots.Dot("Could the probe tell them apart?"))
        rows.append(_dot(verdict.instrument, LP10, _one_sided(verdict.instrument), (rule.CLEAR,)))
    svg = plots.dots(rows, "The verdict", "difference in points", zero=True, brief=True)
    caption = (
        "Differences of two arms. Upright: the mean. Small points: each seed. Dashed: thresholds. C1, C2 and C4 are a "
        "YES if all left ends are above 0, a NO if one right end is below 1.5, and “yes, but small” if both are so; "
        "the bar of C3 is its 95 % interval; the ends of the last bar are one-sided, each at 95 %, and the left one "
        f"counts. {FT10}: {METRICS[FT10]}; {LP10}: {METRICS[LP10]}."
    )
    return Figure([("verdict", svg)], caption)


def _dot(contrast: Contrast, note: str, bounds: tuple[float, float], thresholds: tuple[float, ...]) -> plots.Dot:
    name, _, more = _named(contrast).removesuffix(")").partition(" (")
    name = f"{name} ({', '.join(filter(None, (more, note)))})"
    return plots.Dot(name, contrast.estimate.mean, bounds, 0, contrast.by_seed, thresholds)


def table(verdict: Verdict) -> Table:
    """A row for each condition: its difference, its bounds, what it would have detected, and what it says."""
    parts = []
    for claim, answer in verdict.claims.items():
        rows = []
        for contrast in answer.conditions:
            low, high = answer.bounds(contrast)
            words = ("holds" if high >= MARGIN else "holds, small") if low > 0 else "fails" if high < MARGIN else "open"
            rows.append(_row(contrast, "", (low, high), percent(answer.detectable(contrast)), words))
        if rows:
            parts.append((f"{claim} {CLAIMS[claim]}: {_said(answer)}", rows))
        if claim == "C2":
            rows = [_row(found.contrast, note, found.bounds, "", found.said) for note, found in _sizes(verdict)]
            parts.append((f"C3 {CLAIMS['C3']}: {verdict.noise.said}", rows))
    if verdict.instrument:
        told = "yes" if rule.could_tell(verdict.instrument.estimate) else "no"
        parts.append(
            ("Instrument: above 3 points?", [_row(verdict.instrument, "", _one_sided(verdict.instrument), "", told)])
        )
    caption = (
        "In points. Bounds of C1, C2 and C4: one-sided, the lower at 95 % after Holm's procedure over the claims, the "
        "upper at 95 % for all conditions of its claim together; of C3: the 95 % interval; of the instrument: "
        "one-sided, each at 95 %. “Found from”: the true gain that would have been found with a power of 80 %."
    )
    if verdict.noise_tuned and verdict.noise_tuned.instrument is None:
        caption += (
            f" By {FT10}, C3 cannot be EQUIVALENT: the autoencoder is not fine-tuned, and nothing else would show that "
            f"{FT10} could tell objectives apart."
        )
    return Table([("", ["difference", "bounds", "seeds", "found from", "condition"])], parts, caption)


def _one_sided(contrast: Contrast) -> tuple[float, float]:
    return contrast.estimate.lower(ALPHA), contrast.estimate.upper(ALPHA)


def _row(contrast: Contrast, note: str, bounds: tuple[float, float], least: str, words: str) -> tuple[Cell, list[Cell]]:
    mean, seeds = contrast.estimate.mean, contrast.estimate.seeds
    cells = [Cell(text) for text in (_points(mean), _between(bounds), str(seeds), least, words)]
    return Cell(_named(contrast), ", ".join(filter(None, (contrast.metric, note)))), cells
