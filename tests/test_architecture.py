"""Imports run one way: between the rooms of eval, between the files of ssl_vit, and never from ssl_vit to eval."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# what each room may import of eval; a command is a file directly in eval/
ROOMS = {
    "commands": {"page", "schedule", "compare", "measure"},
    "page": {"compare", "measure"},
    "schedule": {"compare", "measure"},
    "compare": {"measure"},
    "measure": set(),
}


def modules() -> dict[str, Path]:
    """{dotted name: file} of both packages."""
    files = [path for package in ("ssl_vit", "eval") for path in (ROOT / package).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, when it is loaded or later; those for types alone do not count."""
    found = set()
    tree = ast.parse(path.read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & known.keys()


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "commands"


def wrong_rooms(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """(module, what it imports) of eval against the arrows; commands do not import one another."""
    found = []
    for module, others in edges.items():
        for other in others:
            if module.startswith("eval") and other.startswith("eval") and other != "eval":
                allowed = ROOMS[room(module)] | ({room(module)} - {"commands"})
                if room(other) not in allowed:
                    found.append((module, other))
    return found


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """Modules that import one another in a circle, or None."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return None
        for other in sorted(edges[module]):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return None

    return next((found for module in sorted(edges) if (found := visit(module, []))), None)


@pytest.fixture(scope="module")
def edges():
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def test_the_rooms_of_eval_import_one_way(edges):
    assert wrong_rooms(edges) == []
    assert wrong_rooms({"eval.compare.x": {"eval.page.y"}, "eval.knn": {"eval.page.y"}}) == [
        ("eval.compare.x", "eval.page.y")
    ]
    assert wrong_rooms({"eval.knn": {"eval.finetune"}}) == [("eval.knn", "eval.finetune")]


def test_there_is_no_circle(edges):
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}  # which only re-export
    assert circle({name: others - packages for name, others in edges.items() if name not in packages}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_ssl_vit_knows_nothing_of_eval(edges):
    assert not [(m, o) for m, others in edges.items() for o in others if m.startswith("ssl_vit") and o[:4] == "eval"]


def test_an_objective_imports_neither_the_loop_nor_the_data(edges):
    loop = {"ssl_vit.pretrain", "ssl_vit.engine", "ssl_vit.monitor", "ssl_vit.checkpoint"}
    for module, others in edges.items():
        if module.startswith("ssl_vit.objectives."):
            assert not others & loop and not any(other.startswith("ssl_vit.data") for other in others), module


def test_eval_uses_the_loop_where_docs_architecture_says_so(edges):
    users = {module for module, others in edges.items() if module.startswith("eval") and "ssl_vit.pretrain" in others}
    assert users == {"eval.difficulty", "eval.finetune", "eval.schedule.cost"}
