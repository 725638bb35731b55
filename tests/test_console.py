"""`ssl-vit COMMAND`, and messages that name a command in the way in which the process was started."""

import json
import re
import shlex
import subprocess
import sys
import types

import pytest
from test_loop import ROOT, environment

from ssl_vit import __version__, commands, console


def ssl_vit(monkeypatch, *arguments):
    """The exit code of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/ssl-vit", *arguments])
    with pytest.raises(SystemExit) as end:
        console.main()
    return end.value.code


def test_help_lists_every_command_by_its_docstring_and_imports_nothing_heavy():
    code = (
        "import json, sys; from ssl_vit import console; sys.argv = ['ssl-vit', '--help']\n"
        "try: console.main()\n"
        "finally: print(json.dumps([m for m in sys.modules if m in ('torch', 'numpy', 'yaml', 'eval')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, modules = done.stdout.splitlines()
    assert json.loads(modules) == []
    assert max(map(len, lines)) <= 80
    entries = re.sub(r"\n {8,}", " ", "\n".join(lines)).splitlines()  # a long one goes on there
    listed = {
        words[0]: " ".join(words[1:]) for line in entries if (words := line.split()) and words[0] in commands.COMMANDS
    }
    scripts = [*(ROOT / "eval").glob("*.py"), *(ROOT / "ssl_vit").glob("*.py")]
    started = [p for p in scripts if "errors.run(main)\n" in p.read_text()]
    assert {commands.script(name) for name in listed} == set(started) and len(started) == 15
    for name, line in listed.items():
        assert commands.script(name).read_text().startswith(f'"""{line}\n')


def test_help_fills_paragraphs_and_keeps_the_lines_of_commands_and_lists():
    words = " ".join(["twelve"] * 11)
    text = f"One.\nTwo.\n\n    python x.py\n    python y.py {words}\n        {words}\n"
    text += f"Presets:\n  a   {words}\n      b\n  c   d"
    assert commands.folded(text).splitlines() == [
        "One. Two.",
        "",
        "    python x.py",
        f"    python y.py {'twelve ' * 9}".rstrip(),
        f"        {'twelve ' * 10}".rstrip(),
        f"        {'twelve ' * 3}".rstrip(),
        "Presets:",
        f"  a   {'twelve ' * 10}".rstrip(),
        "      twelve b",
        "  c   d",
    ]


def test_version(monkeypatch, capsys):
    assert ssl_vit(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"ssl_vit {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["linear_probes"], "error: There is no command 'linear_probes'. Did you mean 'linear-probe'? Commands: "),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["knn", "--backbone", "runs/none"], "error: "),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(monkeypatch, capsys, arguments, said):
    assert ssl_vit(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_of_a_command_is_of_the_command(monkeypatch, capsys, name):
    module = __import__(commands.COMMANDS[name], fromlist=["main"])
    monkeypatch.setattr(module, "__doc__", module.__doc__)  # which the command rewrites
    assert ssl_vit(monkeypatch, name, "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: ssl-vit {name} ") and f"\n    ssl-vit {name} " in said or name == "pretrain"
    assert "python ssl_vit/" not in said and "python eval/" not in said and "launch eval/" not in said
    assert max(map(len, said.splitlines())) <= 80
    assert "launch ssl_vit/" not in said and (name != "pretrain" or "accelerate launch -m ssl_vit.pretrain" in said)


@pytest.mark.parametrize(
    ("started", "spec", "pretrain", "knn", "launched"),
    [
        ("ssl-vit pretrain", None, "ssl-vit pretrain", "ssl-vit knn", "-m ssl_vit.pretrain"),
        ("ssl_vit/pretrain.py", None, "python ssl_vit/pretrain.py", "python eval/knn.py", "ssl_vit/pretrain.py"),
        ("pretrain.py", None, "python pretrain.py", "python ../eval/knn.py", "pretrain.py"),
        (
            "/a b/ssl_vit/pretrain.py",
            None,
            "python '/a b/ssl_vit/pretrain.py'",
            "python '/a b/eval/knn.py'",
            "'/a b/ssl_vit/pretrain.py'",
        ),
        (
            "/x/ssl_vit/pretrain.py",
            "ssl_vit.pretrain",
            "python -m ssl_vit.pretrain",
            "python -m eval.knn",
            "-m ssl_vit.pretrain",
        ),
        ("a-notebook", None, "python ssl_vit/pretrain.py", "python eval/knn.py", "ssl_vit/pretrain.py"),
    ],
)
def test_commands_are_named_as_this_one_was_started(monkeypatch, started, spec, pretrain, knn, launched):
    monkeypatch.setattr(sys, "argv", [started, "--recipe", "mae"])
    monkeypatch.setitem(
        sys.modules, "__main__", types.SimpleNamespace(__spec__=spec and types.SimpleNamespace(name=spec))
    )
    assert shlex.join(commands.typed("pretrain")) == pretrain
    assert shlex.join(commands.typed("knn")) == knn
    assert shlex.join(commands.launchable("pretrain")) == launched
    assert commands.current() == (None if started == "a-notebook" else "pretrain")


@pytest.mark.parametrize("foreign", ["eval/__init__.py", "eval.py"])
@pytest.mark.parametrize("start", [["-m", "ssl_vit.console", "knn"], [str(ROOT / "eval/knn.py")]])
def test_another_package_called_eval_is_met_with_a_sentence(tmp_path, foreign, start):
    file = tmp_path / "other" / foreign
    file.parent.mkdir(parents=True)
    file.write_text("")
    variables = environment()
    variables["PYTHONPATH"] = f"{tmp_path / 'other'}:{variables['PYTHONPATH']}"
    command = [sys.executable, *start, "--backbone", "pixels"]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith(f"error: Python finds another package eval ({file}) before")
        and done.stderr.count("\n") == 1
    )
