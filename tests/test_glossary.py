"""The glossary names settings that exist, and its page is what the code says."""

from dataclasses import fields
from pathlib import Path

from generate import glossary

from ssl_vit import objectives
from ssl_vit import recipe as recipes

ROOT = Path(__file__).parent.parent


def test_every_name_of_ours_is_a_setting():
    known = {f"{section}.{f.name}" for section, cls in recipes.SECTIONS.items() for f in fields(cls)}
    known |= {f"objective.{f.name}" for name in objectives.names() for f in fields(objectives.find(name).Config)}
    assert set(glossary.THEIRS) <= known


def test_a_name_that_all_agree_on_is_ours():
    for ours, theirs in glossary.THEIRS.items():
        names = {name for name in theirs if name.isidentifier()}
        if len(names) == 1 and all(theirs) and all(name.isidentifier() for name in theirs):
            assert names == {ours.partition(".")[2]}


def test_the_page_is_what_the_code_says():
    assert (ROOT / "docs" / "glossary.md").read_text() == glossary.markdown()
