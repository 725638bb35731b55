"""What the documents name is there: commands with their options, recipes and settings, files, links."""

import argparse
import ast
import dataclasses
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from test_loop import ROOT

from eval.compare.evidence import read
from eval.compare.rule import decide
from eval.compare.scope import scope
from eval.compare.studies import read_study
from eval.page.verdict_section import sentence
from eval.schedule import plans
from ssl_vit import commands, objectives
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
RECIPES = list(recipes.RECIPES.rglob("*.yaml"))
MODULES = [p for folder in ("ssl_vit", "eval", "tests", "docs") for p in (ROOT / folder).rglob("*.py")]
STARTERS = r"(?:python|accelerate launch|torchrun|srun|\./launch\.sh|ssl-vit)(?= |$)"
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def commands_of(path: Path) -> list[str]:
    """The commands of a page's bash blocks and inline code, of a recipe's header, of a module's docstring."""
    text = path.read_text()
    if path.suffix == ".md":
        blocks = [body for _, language, body in FENCE.findall(text) if language == "bash"]
        text = re.sub(r"\s*\n\s*", " ", FENCE.sub("", text))
        blocks += re.findall(rf"`({STARTERS}[^`]*)`", text)
    elif path.suffix == ".yaml":
        blocks = ["\n".join(re.findall(rf"^#   +((?:{STARTERS}|--).*)$", text, re.MULTILINE))]
    else:
        text = ast.get_docstring(ast.parse(text)) or ""
        text = re.sub(r"\n {8,}", " ", text)  # a usage goes on there
        blocks = re.findall(rf"^ {{4}}({STARTERS}.*)$", text, re.MULTILINE)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def simple(line: str) -> list[list[str]]:
    """The words of each command of a shell's line, as in a loop, with 0 for its variables."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
    lexer.whitespace_split, lexer.commenters = True, "#"
    found: list[list[str]] = [[]]
    for word in lexer:
        if re.fullmatch(r"[;&]+|\|", word):
            found.append([])
        elif found[-1] or not re.fullmatch(r"do|[A-Z_]+=\S*", word):  # variables before a command
            found[-1].append(re.sub(r"\$\w+", "0", word))
    return [words for words in found if words and re.match(STARTERS, " ".join(words))]


def unknown_option(words: list[str], text: str) -> str | None:
    """The first --option that the text, such as a --help, does not name."""
    options = (word.strip("[]").partition("=")[0] for word in words if re.match(r"\[?--", word))
    return next((option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", text)), None)


class Parsed(Exception):
    """Raised in place of what a command does after it has read its arguments."""


def parse(name: str, words: list[str], usage: bool) -> None:
    """Have one of our commands read its arguments. Raises ValueError for what it does not know.

    usage: whether they are a usage with [optional] parts, of which the options alone are looked at.
    """
    plain = {way: getattr(argparse.ArgumentParser, way) for way in ("parse_args", "parse_intermixed_args")}

    def stop(way):
        def read(parser, given=None):
            if not usage:
                raise Parsed(plain[way](parser, given))
            if unknown := unknown_option(words, parser.format_help()):
                raise ValueError(f"{name} has no {unknown}")
            raise Parsed(None)

        return read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *(words if not usage else [])])
        for way in plain:
            patch.setattr(argparse.ArgumentParser, way, stop(way))
        try:
            importlib.import_module(commands.COMMANDS[name]).main()
        except SystemExit as end:
            if end.code:
                raise ValueError(f"{name} does not take {shlex.join(words)}") from None
            return
        except Parsed as parsed:
            args = parsed.args[0]
    if args is not None and name == "pretrain" and args.recipe and not args.recipe.isupper():
        objectives.read_recipe(args.recipe, args.settings, None)
    if args is not None and name == "study" and not args.plan.isupper():
        plans.read(args.plan).narrow(args.seeds, args.arms, args.evaluators, args.no_tuning)


def check(words: list[str]) -> None:
    """Raises ValueError or UserError if a command names something that is not there."""
    usage = any(word.startswith("[") or re.search(r"[…|]", word) for word in words)
    launchers = "accelerate", "torchrun", "ssl_vit/launcher.py"
    launcher = next((i for i, word in enumerate(words) if word in launchers), None)
    if words[-1] == launchers[-1]:
        return
    if words[0] == "ssl-vit":
        name, arguments = words[1], words[2:]
        if name.startswith("-"):
            return
    elif words[0] == "./launch.sh":
        return check_launch(words[1:], usage)
    elif launcher is not None or "python" in words:
        at = next(i for i, word in enumerate(words) if i > (launcher or 0) and (word.endswith(".py") or word == "-m"))
        file, arguments = words[at], words[at + 1 :]
        if file == "-m":
            file, arguments = f"{arguments[0].replace('.', '/')}.py", arguments[1:]
            if file == "pytest.py":
                return
        name = Path(file).stem.replace("_", "-")
        if not (ROOT / file).is_file():
            raise ValueError(f"there is no {file}")
        if name not in commands.COMMANDS or commands.script(name) != ROOT / file:
            if unknown := unknown_option(arguments, (ROOT / file).read_text()):
                raise ValueError(f"{file} has no {unknown}")
            return
    else:
        raise ValueError("what is it?")
    if name not in commands.COMMANDS:
        raise ValueError(f"ssl-vit has no {name}")
    parse(name, arguments, usage)


def check_launch(words: list[str], usage: bool) -> None:
    name = words[0] if words and not re.match(r"\[|-|.*=", words[0]) else "mae"
    arguments = words[1:] if words and name == words[0] else words
    if name in ("test", "check") or words[:1] == ["--help"]:
        if unknown := unknown_option(arguments, (ROOT / "launch.sh").read_text()):
            raise ValueError(f"launch.sh {name} has no {unknown}")
    elif name in ("compare", "study"):
        plan = "compare" if name == "compare" else "denoising-full" if "--full" in arguments else "denoising"
        parse("study", [plan, *(word for word in arguments if word != "--full")], usage)
    elif name == "advise":
        parse("advise", arguments, usage)
    else:
        if not name.isupper() and not name.endswith(".yaml"):
            recipes.find(name)
        parse("pretrain", ["--recipe", name, *arguments], usage)


def test_the_readme_is_short_and_has_a_table_of_contents():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    sections = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    contents, _, _ = text.partition(f"## {sections[0]}")
    assert [s for s in sections if f"[{s}](#{s.lower().replace(' ', '-')})" not in contents] == []


def test_every_command_of_the_documents_would_start():
    wrong, checked = {}, 0
    for path in [*PAGES, *RECIPES, *MODULES]:
        for line in commands_of(path):
            for words in simple(line):
                checked += 1
                try:
                    check(words)
                except (ValueError, UserError) as error:
                    wrong[f"{path.relative_to(ROOT)}: {line}"] = str(error)
    assert wrong == {} and checked > 70


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("python eval/kn.py --backbone runs/x", "there is no eval/kn.py"),
        ("python eval/knn.py --bakcbone runs/x", "knn does not take"),
        ("python eval/knn.py --backbone RUN [RUN …] [--date NAME]", "knn has no --date"),
        ("for s in 0 1; do python -m eval.knn --backbone $s --key 2; done", "knn does not take"),
        ("accelerate launch -q ssl_vit/pretrain.py --recipe maee", "no recipe 'maee'"),
        ("OMP_NUM_THREADS=1 ssl-vit pretrain --recipe mae train.epoch=1", "train.epoch"),
        ("torchrun --nproc_per_node 2 -m ssl_vit.pretrain --recipe mae optim.lr=fast", "optim.lr"),
        ("srun -n 1 torchrun ssl_vit/pretrain.py --recipe mae objective.sigmas=1", "objective.sigmas"),
        ("ssl-vit linear_probe --backbone runs/x", "no linear_probe"),
        ("python eval/study.py comparee", "comparee"),
        ("python eval/study.py compare --arms mae,dinno", "dinno"),
        ("./launch.sh dinno", "no recipe 'dinno'"),
        ("./launch.sh train.epoch=1", "train.epoch"),
        ("./launch.sh study --ful --data cifar10", "study does not take"),
        ("./launch.sh test --al", "has no --al"),
        ("python tests/mutants/run.py --fast", "has no --fast"),
    ],
)
def test_a_command_that_would_not_start_is_found(line, said):
    for page in (f"```bash\n{line}  # and why\n```\n", f"It is `{line}`."):
        words = [found for _, _, body in FENCE.findall(page) for found in simple(body)]
        with pytest.raises((ValueError, UserError), match=re.escape(said)):
            check(*words or simple(re.findall("`(.*)`", page)[0]))


def test_every_setting_of_the_documents_exists():
    known = {f"{section}.{f.name}" for section, cls in recipes.SECTIONS.items() for f in dataclasses.fields(cls)}
    for name in objectives.names():
        known |= {f"objective.{f.name}" for f in dataclasses.fields(objectives.find(name).Config)}
    known |= {"objective.name", "objective.key"}  # key=value stands for any
    pattern = re.compile(rf"(?<![\w.])((?:{'|'.join([*recipes.SECTIONS, 'objective'])})\.[a-z_]+)=(?!=)")
    files = [*PAGES, *RECIPES, ROOT / "launch.sh", *(p for p in MODULES if "tests" not in p.parts)]
    found = {(key, str(p.relative_to(ROOT))) for p in files for key in pattern.findall(p.read_text())}
    assert len(found) > 50
    assert {(key, file) for key, file in found if key not in known} == set()


def test_every_file_of_the_documents_exists():
    folders = "ssl_vit|eval|tests|recipes|docs"
    pattern = re.compile(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\.(?:py|yaml|md))\b")
    files = [*PAGES, *RECIPES, ROOT / "launch.sh", *(p for p in MODULES if "tests" not in p.parts)]
    texts = {p: FENCE.sub(lambda m: "" if m[2] == "python" else m[0], p.read_text()) for p in files}
    named = {(name, str(p.relative_to(ROOT))) for p, text in texts.items() for name in pattern.findall(text)}
    assert len(named) > 50
    assert {(name, file) for name, file in named if not (ROOT / name).is_file()} == set()


def test_the_documents_say_what_the_verdict_says():
    """That it is not decided yet, and then its sentence. Before all is measured no contrast is computed."""
    evidence = read(read_study(ROOT / "docs/results/denoising-small"))
    verdict = decide(evidence)
    for page in ("README.md", "docs/denoising-study.md", "docs/results.md"):
        text = " ".join((ROOT / page).read_text().replace("*", "").split())
        assert ("not decided yet" in text.lower()) is bool(verdict.lacking), page
        if not verdict.lacking and page != "docs/results.md":
            assert sentence(verdict, scope(evidence)) in text, (
                f"{page} must hold the sentence that eval/verdict.py prints"
            )


def test_the_tables_of_results_are_those_of_the_pages():
    """The figures of each row stand together in a row of the page that its section names."""
    found = 0
    for section in re.split(r"^## ", (ROOT / "docs/results.md").read_text(), flags=re.MULTILINE)[1:]:
        page = re.match(r".*\]\((results/[\w/-]+\.md)\)", section)
        tables = [line.replace("*", "") for line in section.splitlines() if line.startswith("|") and "±" in line]
        if not page or not tables:
            continue
        lines = (ROOT / "docs" / page[1]).read_text().replace("*", "").splitlines()
        rows = [set(re.findall(r"[\d.]+ ± [\d.]+", line)) for line in lines if line.startswith("|")]
        for line in tables:
            figures = set(re.findall(r"[\d.]+ ± [\d.]+", line))
            assert any(figures <= row for row in rows), f"{page[1]} has no such row: {line}"
            found += 1
    assert found > 15


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def test_every_link_of_the_documents_leads_somewhere():
    wrong, checked = [], 0
    link = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)")
    for page in PAGES:
        for target, anchor in link.findall(FENCE.sub("", page.read_text())):
            checked += 1
            file = page.parent / target if target else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                wrong.append((str(page.relative_to(ROOT)), target, anchor))
    assert wrong == [] and checked > 20
