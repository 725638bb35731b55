"""The verdict of the denoising study: its rule (docs/denoising-study.md) applied to the rows, never by hand.

    python eval/verdict.py runs/denoising-small-cifar10
    python eval/verdict.py docs/results/denoising-small       # what eval/study.py --results has packed

It reads one study, on one data set, and prints the verdict as text. It names what is not measured yet, and decides
nothing before all of it is. `eval/report.py --study` draws the same with its chart.
"""

import sys
from pathlib import Path

import ssl_vit.own_eval  # noqa: F401  # isort: skip  before torch, and before another package called eval

from eval.compare.evidence import read
from eval.compare.rule import decide
from eval.compare.studies import read_study
from eval.page.document import Block, Figure, Heading, markdown
from eval.page.provenance import several_origins
from eval.page.verdict_section import blocks
from ssl_vit import errors
from ssl_vit.commands import Parser


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("study", type=Path, metavar="STUDY", help="a folder that eval/study.py wrote")
    args = parser.parse_args()
    evidence = read(read_study(args.study))
    said: list[Block] = [block for block in blocks(evidence, decide(evidence)) if not isinstance(block, Figure)]
    place = next((at for at, block in enumerate(said) if isinstance(block, Heading)), len(said))
    said[place:place] = several_origins(evidence.study.groups)
    sys.stdout.write(markdown("Can denoising objectives pre-train ViTs?", said, Path()))


if __name__ == "__main__":
    errors.run(main)
