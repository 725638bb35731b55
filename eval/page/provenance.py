"""The provenance of a page: the command, the protocols, the intervals and the code that made the rows."""

import json

from eval.compare.metrics import NAMES
from eval.compare.runs import Group, Run, differing
from eval.compare.scores import EvalSet
from eval.page.document import (
    Block,
    Code,
    Heading,
    Items,
    Text,
)
from ssl_vit.checkout import commits, in_words
from ssl_vit.errors import listed
from ssl_vit.recipe import short

DEFINITIONS = {
    "knn-k": "k nearest training images by cosine of features centred by the training mean, weights exp(similarity / "
    "0.07). k = 20 is the primary protocol.",
    "knn-uncentred": "The same without centring: DINO's protocol.",
    "linear-sweep": "A linear classifier on frozen features. Its settings are chosen on a held-out slice of the "
    "training images, and so are pooling and blocks, which may be joined, in the column “chosen on train”. Images are "
    "not augmented, so that the accuracy is not that of published protocols.",
    "linear-block": "The same for each block alone; the learning rate is chosen on the held-out slice.",
    "linear-mae": "A linear classifier on frozen features, trained as in the MAE paper.",
    "linear-dino": "A linear classifier on frozen features, trained as in the DINO paper.",
    "logistic": "Logistic regression on frozen features; its regularisation is chosen on a held-out slice of train.",
    "robust-": "The linear probe, trained on clean features, on corrupted test images.",
    "segmentation-linear": "A linear layer on the patch features of whole images, fitted by L-BFGS to the fractions of "
    "the classes in each patch; its penalty is chosen on a held-out tenth of train. Scores are resized to the mask "
    "(bilinear). The mIoU is the mean over the classes of intersection over union, of the pixels of all test images; a "
    "class that no test mask has counts as 0 if any pixel is predicted as it, and else not at all; "
    "its intervals are by the jackknife over images.",
    "segmentation-knn-k20": "The fractions of the classes in the 20 most similar patches of training images (centred "
    "cosine), weighted by exp(similarity / 0.07); 50,000 patches at most are searched.",
    "segmentation-finetune": "All weights are trained further, together with a decoder of two convolutions that "
    "upsample, on random crops and flips of images with their masks; of several learning rates the best on a held-out "
    "tenth of train is used. For the random initialisation, this is training from scratch.",
    "attention-masks": "The patches that hold 60 % of the class token’s attention in the last block, for each head, as "
    "a mask. For each class that an image shows, the head counts that overlaps it best (Jaccard index); the mean over "
    "these classes is the image’s value. More heads are more tries: compare with the random initialisation of the same "
    "shape.",
    "finetune": "All weights are trained further, with labels: crops of half the area or more, flips, mixup, cutmix, "
    "label smoothing, and layer decay (recipes/finetune.yaml, which is not a published protocol). For the random "
    "initialisation, this is training from scratch, without layer decay unless it is set. Models that are no ViTs "
    "have no drop path. A code after the name stands for other settings; otherwise, different settings never share a "
    "column.",
}
INTERVALS = (
    "The same test images serve every seed: seeds and images are crossed. The half-width of a 95 % interval is "
    "hypot(t · SE over the S seeds, 1.96 · SE over the test images), where SE is the standard error. A difference is "
    "first paired by image and seed. With four or more seeds, each arm and each difference has its own variance "
    "between seeds, and t has S − 1 degrees of freedom. Two or three seeds say too little about this variance (t(1) "
    "is 12.7): it is then the larger of their own and the one pooled over all arms by the same metric, with the "
    "pool’s degrees of freedom; the interval of an arm that is far less stable than the others is then too narrow. "
    "With one seed, the interval covers the test images only. Where ± would cross 0 or 100 %, or where all or no "
    "images are classified correctly, the bounds are shown instead: for an accuracy, those of Wilson’s interval with "
    "the seeds’ term added, clipped to 0 and 100 %. The bootstrap beside it resamples seeds and images independently, "
    "1,000 times; with few seeds it is too narrow."
)


def _clustered(eval_set: EvalSet) -> str:
    if eval_set.clusters is None:
        return ""
    count = eval_set.clusters.max() + 1
    return (
        f"The {len(eval_set.truth):,} test images of {eval_set.data} are not independent: by their names they are "
        f"{count:,} clusters, such as patients or videos. Each cluster counts once in the standard errors over images, "
        f"and t with {count - 1:,} {'degree' if count == 2 else 'degrees'} of freedom takes the place of 1.96."
    )


READING = ("permute_pixels", "jpeg_draft", "in_chans", "layout", "pages", "background", "range")  # in data


def several_origins(groups: list[Group]) -> list[Block]:
    """A warning if the rows or their runs come from several versions of code, packages, images, recipe finetune or
    sweep; and one of seeds of an arm that have different settings."""
    runs = [run for group in groups for run in group.runs]
    rows = [row for run in runs for row in run.rows]
    recipes = {row.get("settings", {}).get("recipe") for row in rows if row["protocol"].startswith("finetune")}
    swept = [row.get("settings", {}) for row in rows if row["protocol"] in ("linear-sweep", "linear-block")]
    grids = {json.dumps(settings.get("rates")) for settings in swept if "tried" in settings}
    precisions: dict[str, set[str]] = {}
    for row in rows:
        if row.get("precision", "fp32"):  # raw pixels have none
            precisions.setdefault(row["protocol"], set()).add(row.get("precision", "fp32"))
    trained, tested = _images(runs)
    numbers: dict[tuple, set[int]] = {}
    for row in rows:
        key = row["eval_data"], row["split"], row["protocol"], row["label_fraction"]
        numbers.setdefault(key, set()).add(row["train_n"])
    measured = {commit for row in rows for commit in (row["commit"], *row.get("settings", {}).get("commits", ()))}
    made = {commit for run in runs for commit in _trained(run).values()} | {row.get("trained_by") for row in rows}
    origins = {
        "commits of this code": measured,
        "commits of the code that trained the runs": made - {None},
        "precisions of the evaluated backbones by the same protocol": max(precisions.values(), key=len, default=set()),
        "sets of package versions": {json.dumps(row["versions"], sort_keys=True) for row in rows},
        "versions of the recipe finetune": recipes,
        "learning-rate grids of the linear sweep": grids,
        "versions of the training images of one name": trained,
        "versions of the test images of one name": tested,
        "numbers of labelled images by the same protocol": max(numbers.values(), key=len, default=set()),
    }
    several = [f"{len(found)} {name}" for name, found in origins.items() if len(found) > 1]
    words = []
    if several:
        words.append(f"These rows come from {listed(several)}: see results.jsonl and recipe.yaml of each run.")
    for group in groups:
        if keys := sorted({key for run in group.runs[1:] for key in differing(group.runs[0], run)}):
            words.append(f"The seeds of {group.label} were trained with different settings: {listed(keys)}.")
    return [Text(text, "warning") for text in words]


def _images(runs: list[Run]) -> tuple[set[str], set[str]]:
    """The fingerprints of the training images and of the test images, of which one name has the most, read alike."""
    trained: dict[tuple, set[str]] = {("", ""): set()}
    tested: dict[tuple, set[str]] = {("", ""): set()}
    for run in runs:
        data = run.settings.get("data", {})
        how = json.dumps([data.get(key) or None for key in READING])
        if "fingerprint" in run.settings.get("images", {}):
            part = json.dumps([data.get(key) or None for key in ("train_split", "hold_out", "subset", "subset_seed")])
            trained.setdefault((short(data["name"]), how, part), set()).add(run.settings["images"]["fingerprint"])
        for row in run.rows:
            if "images" in row:
                tested.setdefault((row["eval_data"], row["split"], how), set()).add(row["images"])
    return max(trained.values(), key=len), max(tested.values(), key=len)


def provenance(groups: list[Group], eval_sets: list[EvalSet], command: str) -> list[Block]:
    """How to reproduce the page, what names and protocols stand for, and which code made the rows."""
    runs = [run for group in groups for run in group.runs]
    codes = {name: words for g in groups for name, words in g.codes.items() if name in (g.label, g.family)}
    protocols = {metric.protocol for eval_set in eval_sets for metric in eval_set.scores}
    # a protocol is defined by the longest of these names that it starts with
    used = {max((start for start in DEFINITIONS if p.startswith(start)), key=len, default=None) for p in protocols}
    definitions = [(_defined(start), words) for start, words in DEFINITIONS.items() if start in used]
    for eval_set in eval_sets:
        for metric in eval_set.metrics(lambda c: c.finetunes):
            row = next(iter(eval_set.scores[metric].values())).rows[0]
            changed = ", ".join(f"{key}={value}" for key, value in row.get("settings", {}).get("changed", {}).items())
            base = "The recipe finetune" if metric.protocol.startswith("finetune") else "The same"
            definitions += [(metric.evaluator, f"{base} with {changed}.")] if changed else []
    definitions = list(dict.fromkeys(definitions))
    made: dict[tuple, set[str]] = {}
    trained: dict[str, set[str]] = {}
    for run in runs:
        if run.settings:
            trained.setdefault(in_words(_trained(run)), set()).add(run.folder.name)
        for row in run.rows:
            versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
            made.setdefault((row["commit"] or "no commit recorded", versions), set()).add(run.folder.name)
    return [
        Heading("Where it comes from"),
        Text("This page was made by the command"),
        Code(command),
        Text(
            "from the rows in results.jsonl of these run directories and the predictions beside them. The HTML page "
            "lists the rows behind each table and chart under it. An accuracy is the fraction of test images "
            "whose class was predicted correctly."
        ),
        *(_named_by_code(codes) if codes else []),
        *(_protocols(definitions) if definitions else []),
        Heading("The intervals", 3),
        Text(INTERVALS),
        *(Text(words) for words in dict.fromkeys(map(_clustered, eval_sets)) if words),
        Heading("The code behind the rows", 3),
        Items([(commit, f"{versions}. Runs: {', '.join(sorted(runs))}") for (commit, versions), runs in made.items()]),
        *(_trainings(trained) if trained else []),
    ]


def _named_by_code(codes: dict[str, str]) -> list[Block]:
    """codes: the settings of recipes by names that hold a hash of them."""
    return [Heading("The recipes that a code names", 3), Items(list(codes.items()))]


def _protocols(definitions: list[tuple[str, str]]) -> list[Block]:
    return [Heading("The protocols", 3), Items(definitions)]


def _trainings(trained: dict[str, set[str]]) -> list[Block]:
    """trained: the names of runs by the commits that trained them."""
    items = [(said, f"Runs: {', '.join(sorted(runs))}") for said, runs in trained.items()]
    return [Heading("The code that trained the runs", 3), Items(items)]


def _trained(run: Run) -> dict[int, str | None]:
    """{step: the commit that trained a run from that step on}."""
    return commits(run.settings, run.log)


def _defined(start: str) -> str:
    return {"knn-k": "k-NN", "knn-uncentred": "k-NN, uncentred"}.get(start) or NAMES[start]
