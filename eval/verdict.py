"""The verdict of the denoising study: its rule (docs/denoising-study.md) applied to the rows, never by hand.

    python eval/verdict.py runs/denoising-full-cifar10 runs/denoising-full-tiny-imagenet-100

It reads studies that eval/study.py ran, on one data set or on both, and names what is not measured yet. The digits
decide nothing, and are refused.
"""

import argparse
import sys
from pathlib import Path

import ssl_vit.own_eval  # noqa: F401  or another package called eval is imported
from eval.compare.rule import DATA, collect
from eval.compare.studies import read_study
from eval.page.document import markdown
from eval.page.provenance import several_origins
from eval.page.verdict_section import blocks
from ssl_vit import errors
from ssl_vit.commands import HelpFormatter
from ssl_vit.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY", help="folders that eval/study.py wrote")
    args = parser.parse_args()
    if len(args.studies) > len(DATA):
        raise UserError(f"A verdict is on {' and '.join(DATA)}: name one study of each.")
    evidence = collect([read_study(folder) for folder in args.studies])
    runs = [run for e in evidence for group in e.study.groups for run in group.runs]
    said = several_origins(runs) + blocks(evidence)
    sys.stdout.write(markdown("Can denoising objectives pre-train ViTs?", said, Path()))


if __name__ == "__main__":
    errors.run(main)
