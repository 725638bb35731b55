"""The scripts of eval/ import this file before eval: if Python would find another package of that name, such as an
eval/ on PYTHONPATH, it prints one sentence and exits.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

from ssl_vit.commands import ROOT

spec = PathFinder.find_spec("eval")
if spec is not None:  # None in an editable installation, whose packages are found last
    place = Path(spec.origin or list(spec.submodule_search_locations or [])[0])
    if ROOT / "eval" not in place.resolve().parents:
        print(
            f"error: Python finds another package eval ({place}) before that of ssl_vit ({ROOT / 'eval'}): take it off "
            "PYTHONPATH, or install ssl_vit in an environment of its own.",
            file=sys.stderr,
        )
        sys.exit(2)
