"""Every script starts, from anywhere, with nothing of ours in the way of an installed package."""

import ast
import importlib.util
import platform
import re
import resource
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENT, start
from test_loop import ROOT, environment

SCRIPTS = [
    "ssl_vit/pretrain.py",
    "ssl_vit/export.py",
    *(f"eval/{p.name}" for p in sorted((ROOT / "eval").glob("[!_]*.py"))),
]


@pytest.mark.parametrize("script", ["ssl_vit/pretrain.py", "eval/finetune.py"])
def test_a_script_starts_beside_transformers(script, tmp_path):
    """With transformers imported first by the interpreter: nothing beside the script is taken for a part of it."""
    (tmp_path / "sitecustomize.py").write_text("import transformers, timm\n")
    variables = environment()
    variables["PYTHONPATH"] += f":{tmp_path}"
    result = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], env=variables, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "python" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there")
def test_threads_that_wait_for_others_soon_sleep():
    """Torch's OpenMP says what it read when it was loaded, which must be after the package has set it."""

    def spins(**own: str) -> str:
        variables = {key: value for key, value in environment().items() if not key.startswith(("OMP_", "GOMP_"))}
        variables |= dict(OMP_DISPLAY_ENV="VERBOSE", **own)
        result = subprocess.run([sys.executable, "-c", "import ssl_vit, torch"], env=variables, capture_output=True)
        found = set(re.findall(r"GOMP_SPINCOUNT = '(.+)'", result.stderr.decode()))
        if not found:
            pytest.skip("this torch has another OpenMP than GNU's")
        return found.pop()

    assert spins() == "4000"
    assert spins(GOMP_SPINCOUNT="77") == "77"  # the user wins
    assert spins(OMP_WAIT_POLICY="active") not in ("4000", "77")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or resource.getpagesize() != 4096, reason="other settings, or pages"
)
def test_freed_memory_is_kept_for_the_next_step():
    """The kernel hands out a page at its first use: its count when four arrays of 30 MB are made for the third time."""

    def pages(**own: str) -> int:
        code = """
            import resource
            import numpy as np
            from ssl_vit import system

            system.prepare(1)
            for _ in range(3):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                arrays = [np.ones(30_000_000, np.uint8) for _ in range(4)]
                del arrays
            print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        """
        variables = {key: value for key, value in environment().items() if not key.startswith("MALLOC_")} | own
        command = [sys.executable, "-c", textwrap.dedent(code)]
        return int(subprocess.run(command, env=variables, capture_output=True, check=True).stdout)

    assert pages() < 50
    assert pages(MALLOC_TRIM_THRESHOLD_="1000000") > 50  # the user wins; a page has at most 2 MB


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_package_is_imported_before_torch(script):
    imports = [
        node for node in ast.parse((ROOT / script).read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = [n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports]
    others = [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]
    assert others[0].split(".")[0] == "ssl_vit"


def as_script(script: str) -> Callable[[], None]:
    def run():
        sys.path.insert(0, str(ROOT / Path(script).parent))
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return run


def as_module(script: str) -> Callable[[], None]:
    return lambda: runpy.run_module(script.removesuffix(".py").replace("/", "."), run_name="__main__", alter_sys=True)


@pytest.mark.parametrize("form", [as_script, as_module])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, form, tmp_path):
    """As a script and with -m, in children that share the imports; the help names its command, and every key."""
    run = form(script)
    run.__module__ = script.removesuffix(".py").replace("/", ".")
    process = start(run, tmp_path, tmp_path / "said.txt", "--help")
    process.join(PATIENT)
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 0, said
    assert f"{script} " in said
    if "pretrain" in script:
        assert all(key in said for key in ("train.epochs", "optim.lr", "runtime.per_device_batch_size"))


@pytest.mark.parametrize("folder", ["ssl_vit", "eval"])
def test_no_file_bears_the_name_of_an_installed_module(folder):
    """A script's own folder comes first on the import path, so its neighbours shadow what is installed."""
    names = {p.stem for p in (ROOT / folder).glob("*.py")} - {"__init__"}
    code = (
        "import importlib.util, sys; "
        f"print([n for n in {sorted(names)} if n in sys.stdlib_module_names or importlib.util.find_spec(n)])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment(), capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_eval_imports_no_objective_and_objectives_no_loop():
    def imported(folder, without=()):
        text = "".join(p.read_text() for p in (ROOT / folder).glob("*.py") if p.name not in without)
        return [line for line in text.splitlines() if line.startswith(("import ", "from "))]

    assert not [line for line in imported("eval") if "ssl_vit.objectives" in line]  # but how a recipe is read
    inner = imported("ssl_vit/objectives")
    assert not [
        line
        for line in inner
        if any(w in line for w in ("pretrain", "ssl_vit.data", "ssl_vit import data", "eval.", "monitor"))
    ]
    assert importlib.util.find_spec("ssl_vit") and Path(ROOT / "recipes").is_dir()
