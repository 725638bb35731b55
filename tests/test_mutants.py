"""The deliberate faults of tests/mutants still apply to the code; whether tests find them, its run.py tells."""

import difflib
import importlib.util
import shutil
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("mutants", Path(__file__).parent / "mutants" / "run.py")
mutants = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutants)


@pytest.mark.skipif(not (mutants.ROOT / ".git").exists() or not shutil.which("git"), reason="no git checkout")
def test_every_fault_still_applies():
    everyone = mutants.everyone()
    assert len(everyone) >= 40
    assert {m.name: said for m in everyone if (said := mutants.apply(m, mutants.ROOT, "--check"))} == {}


def test_a_fault_without_a_sentence_or_tests_is_refused(tmp_path):
    for head in ("", "tests: tests/test_masks.py\n", "A sentence.\n", "A sentence.\ntests: tests/test_nothing.py\n"):
        (tmp_path / "wrong.patch").write_text(head + "diff --git a/x b/x\n")
        with pytest.raises(ValueError, match=r"wrong.patch must begin with"):
            mutants.read(tmp_path / "wrong.patch")


def test_a_fault_that_survives_or_does_not_apply_is_told(tmp_path, monkeypatch, capsys):
    """In a little project of one module and one test."""
    root, scratch = tmp_path / "project", []
    (root / "tests").mkdir(parents=True)
    code = "def add(a, b):\n    return a + b\n\n\ndef twice(a):\n    return 2 * a\n"
    (root / "sums.py").write_text(code)
    (root / "tests" / "test_sums.py").write_text(
        "from sums import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n"
    )
    stale = code.replace("a + b", "a % b")
    faults = dict(
        caught=(code, code.replace("a + b", "a - b")), survives=(code, code.replace("2", "3")), stale=(stale, code)
    )
    for name, pair in faults.items():
        lines = difflib.unified_diff(*(text.splitlines(True) for text in pair), "a/sums.py", "b/sums.py", n=1)
        text = "Wrong.\ntests: tests/test_sums.py\ndiff --git a/sums.py b/sums.py\n" + "".join(lines)
        (tmp_path / f"{name}.patch").write_text(text)

    def copy(folder):
        shutil.copytree(root, folder, dirs_exist_ok=True)
        scratch.append(folder)

    monkeypatch.setattr(mutants, "ROOT", root)
    monkeypatch.setattr(mutants, "HERE", tmp_path)
    monkeypatch.setattr(mutants, "copy", copy)
    assert mutants.main([]) == 1
    said = capsys.readouterr().out
    assert "| caught | test_sums.py::test_add |" in said and "| survives | **survived** |" in said
    assert "| stale | **does not apply**" in said and "1 of 3 caught." in said
    assert mutants.main(["caught"]) == 0 and mutants.main(["nothing"]) == 2
    assert mutants.main(["--help"]) == 0 and "python tests/mutants/run.py NAME …" in capsys.readouterr().out
    assert "a + b" in (root / "sums.py").read_text() and not scratch[0].exists()
    (root / "tests" / "test_sums.py").write_text("def test_add():\n    assert False\n")
    assert mutants.main(["caught"]) == 2 and "Without any fault" in capsys.readouterr().out
