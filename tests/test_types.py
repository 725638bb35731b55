"""Shapes as types: what the code states of its tensors holds where it is used, and refuses what is of another shape."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def calls():
    """What was refused, by call, in a process where shapes are checked."""
    script = Path(__file__).parent / "checked_shapes.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_objective_view_and_evaluator_keeps_to_its_shapes(calls):
    assert {name: said for name, said in calls["right"].items() if said} == {}
    assert len(calls["right"]) >= 20


def test_a_wrong_shape_is_refused_by_name(calls):
    assert {name: said for name, (parameter, said) in calls["wrong"].items() if said != parameter} == {}
    assert len(calls["wrong"]) >= 20


def test_the_code_itself_does_not_import_them():
    """But for type checkers, in an indented line."""
    files = list((Path(__file__).parents[1] / "ssl_vit").rglob("*.py"))
    assert [
        f.name for f in files if re.search("^(from|import) (jaxtyping|beartype)", f.read_text(), re.MULTILINE)
    ] == []
    assert sum("from jaxtyping import" in file.read_text() for file in files) >= 8
