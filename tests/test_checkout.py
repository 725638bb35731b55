"""The commit of the code: that of its own checkout, and whether the code differs from it."""

import os
import re
import subprocess

import pytest

from ssl_vit import checkout


def git(folder, *words):
    """What git says in this folder."""
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def root(tmp_path):
    """A checkout with one file of code and one document."""
    folder = tmp_path / "project"
    for name in ("ssl_vit/loop.py", "docs/page.md"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("one\n")
    git(tmp_path, "init", "-q", "project")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def test_the_commit_of_a_checkout(root):
    commit = git(root, "rev-parse", "HEAD")
    assert len(commit) == 40 and checkout.commit_of(root) == commit
    (root / "docs/page.md").write_text("two\n")  # as a study does, which packs its results beside the code
    assert checkout.commit_of(root) == commit


@pytest.mark.parametrize("changed", ["ssl_vit/loop.py", "eval/new.py"])
def test_code_that_is_not_committed_is_told(changed, root):
    commit = git(root, "rev-parse", "HEAD")
    (root / changed).parent.mkdir(exist_ok=True)
    (root / changed).write_text("two\n")
    found = checkout.commit_of(root)
    assert re.fullmatch(f"{commit}-dirty-[0-9a-f]{{7}}", found) and checkout.commit_of(root) == found
    (root / changed).write_text("three\n")  # other code is not taken for the same
    assert checkout.commit_of(root).startswith(f"{commit}-dirty-") and checkout.commit_of(root) != found
    (root / changed).write_text("two\n")
    git(root, "add", ".")
    assert checkout.commit_of(root) == found
    (root / changed).unlink()
    assert checkout.commit_of(root) not in (commit, found) or changed == "eval/new.py"


def test_changed_times_are_no_change(root):
    commit = checkout.commit_of(root)
    os.utime(root / "ssl_vit/loop.py", (1, 1))
    assert checkout.commit_of(root) == commit


def test_a_package_inside_of_another_checkout_has_no_commit(root, monkeypatch):
    assert checkout.commit_of(root / "ssl_vit") is None
    monkeypatch.setenv("PATH", "")
    assert checkout.commit_of(root) is None  # without git


def test_a_checkout_without_a_commit_has_none(tmp_path):
    git(tmp_path, "init", "-q", "project")
    assert checkout.commit_of(tmp_path / "project") is None
