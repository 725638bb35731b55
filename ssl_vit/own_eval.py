"""The scripts of eval/ import this before eval: where Python would find another package of that name, such as an eval/
on PYTHONPATH, the user gets a sentence.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

from ssl_vit.commands import ROOT

spec = PathFinder.find_spec("eval")
if spec is not None:  # else it is an editable installation, which is found last
    place = Path(spec.origin or list(spec.submodule_search_locations or [])[0])
    if ROOT / "eval" not in place.resolve().parents:
        print(
            f"error: Python finds another eval ({place}) before the package of ssl_vit ({ROOT / 'eval'}): take it off "
            "PYTHONPATH, or install ssl_vit in an environment of its own.",
            file=sys.stderr,
        )
        sys.exit(2)
