"""The linear classifier that a sweep chose, kept beside the run, so that eval/predict.py can use it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from scipy.special import softmax

from eval.measure import features, linear_heads, results
from eval.measure.probing import Probe
from ssl_vit import files, system, weights
from ssl_vit.errors import UserError, listed
from ssl_vit.recipe import short
from ssl_vit.settings import known


@dataclass
class KeptProbe:
    """A softmax regression on features of some blocks. weight: (D + 1, K); mean, factor: (D,), of standardisation.

    digest: of the backbone whose features it was trained on. range: [black, white] of deep images, as it saw them.
    """

    weight: np.ndarray
    mean: np.ndarray
    factor: np.ndarray
    pooling: str
    blocks: list[int]
    classes: list[str]
    digest: str
    range: list[float]
    precision: system.Precision  # in which its features were computed

    def __call__(self, found: np.ndarray) -> np.ndarray:
        """Probabilities, float32 (m, K), of features (m, D)."""
        logits = ((found - self.mean) * self.factor) @ self.weight[:-1] + self.weight[-1]
        probabilities: np.ndarray = softmax(logits, 1)
        return probabilities


def write(
    probe: Probe,
    name: tuple[str, tuple[int, ...]],
    heads: linear_heads.LinearProbes,
    rate: float,
    labels: int,
    seed: int | None,
) -> None:
    """Keep the head of this rate in SOURCE/probes/DATA-LABELS[-seedN].npz. name: pooling and blocks; labels: their
    number; seed: that drew them, in the file's name if it is not 0."""
    if probe.source.backbone is None:
        return
    pooling, blocks = name
    arrays: dict[str, Any] = dict(
        weight=heads.weight[:, heads.rates.index(rate)].cpu().numpy(),
        mean=heads.standardizer.mean,
        factor=heads.standardizer.factor,
        pooling=np.array(pooling),
        blocks=np.array(blocks),
        classes=np.array(known(probe.train.classes), dtype=str),
        digest=np.array(weights.digest(probe.source.backbone)),
        range=np.array(probe.train.range or []),
        precision=np.array(probe.source.precision),
    )
    drawn = f"-seed{seed}" if seed else ""
    target = probe.source.folder / "probes" / f"{short(probe.test.name)}-{labels}{drawn}.npz"
    with results.lock(probe.source.folder), files.writing(target) as partial, open(partial, "wb") as stream:
        np.savez(stream, **arrays)


def read(source: features.Source, file: Path | None) -> KeptProbe:
    """The probe in a file, or the only one of the source. Raises UserError if there is none, or several to choose from.

    A probe of other weights is refused.
    """
    found = [file] if file else sorted((source.folder / "probes").glob("*.npz"))
    if not found:
        raise UserError(
            f"{source.name} has no classifier: fine-tune it (eval/finetune.py) and pass the run in its folder "
            "finetune/, or run eval/linear_probe.py, which keeps one."
        )
    if len(found) > 1:
        raise UserError(f"{source.name} has several probes ({listed([str(f) for f in found])}): choose one by --probe.")
    try:
        with np.load(found[0], allow_pickle=False) as stored:
            kept = {key: stored[key] for key in KeptProbe.__dataclass_fields__}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(f"{found[0]} is no probe of eval/linear_probe.py ({type(error).__name__}).") from None
    probe = KeptProbe(
        kept["weight"],
        kept["mean"],
        kept["factor"],
        str(kept["pooling"]),
        kept["blocks"].tolist(),
        kept["classes"].tolist(),
        str(kept["digest"]),
        kept["range"].tolist(),
        kept["precision"].item(),
    )
    if probe.digest != weights.digest(source.network):
        raise UserError(f"{found[0]} was trained on features of other weights: run eval/linear_probe.py again.")
    return probe
