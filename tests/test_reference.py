"""Settings as they are shown: what --help prints can be typed back, the JSON Schema agrees with the checks."""

import itertools
import json
import math
import re
import shlex
import sys
from dataclasses import MISSING
from pathlib import Path

import pytest
import yaml

from ssl_vit import objectives, pretrain, reference
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError
from ssl_vit.settings import argument, settings_of, write

RECIPES = [path.stem for path in recipes.shipped()]
SECTIONS = [(name, cls, None) for name, cls in recipes.SECTIONS.items()]
SECTIONS += [("objective", objectives.find(name).Config, name) for name in objectives.names()]
SETTINGS = [(s, name) for section, cls, name in SECTIONS for s in settings_of(section, cls).values()]


def read(recipe: str, *settings: str) -> recipes.Recipe:
    return objectives.read_recipe(recipe, list(settings), None)


@pytest.fixture
def printed(monkeypatch, capsys):
    def main(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ssl_vit/pretrain.py", *arguments])
        assert pretrain.main() == 0
        return capsys.readouterr().out

    return main


def typed(text: str) -> dict[str, str]:
    """{what a shell makes of key=value: its mark} of every line that begins with one."""
    found = re.findall(r"^([ *>]) ((?:\w+\.\w+|'\w+\.\w+)=.*?)(?:  .*)?$", text, re.MULTILINE)
    return {shlex.split(word)[0]: mark for mark, word in found}


# -- --help -----------------------------------------------------------------------------------------------------------


def parts(text: str) -> list[str]:
    """The help, cut into SECTIONS by their headings."""
    heads = [f"objective.name={name} (" if name else f"{section}:" for section, _, name in SECTIONS]
    places = [re.search(f"^{re.escape(head)}", text, re.MULTILINE).start() for head in heads] + [len(text)]
    return [text[start:end] for start, end in itertools.pairwise(places)]


def test_help_lists_recipes_and_every_setting_once_in_80_columns(printed):
    text = printed("--help")
    assert max(map(len, text.splitlines())) <= 80
    for name in RECIPES:
        words = recipes.find(name).read_text().partition("\n")[0].removeprefix("# ").split()
        line = rf"^  {name} +" + r"\s+".join(map(re.escape, words)) + "$"
        assert re.search(line, text, re.MULTILINE), name
    for (section, cls, _), part in zip(SECTIONS, parts(text), strict=True):
        keys = re.findall(r"^  (\w+\.\w+)(?==| \(required\))", part, re.MULTILINE)
        assert keys == list(settings_of(section, cls))


def test_help_writes_values_and_bounds_as_one_types_them(printed):
    text = printed("-h")
    for line in (
        r"train.epochs=null +number > 0 \| null",
        r"train.steps=null +integer >= 0 \| null",
        r"train.precision=auto +auto \| fp32 \| tf32 \| bf16",
        r"optim.betas=\[0.9,0.95\] +\[number, ...\]",
        r"optim.warmup_fraction=0.05 +number 0 to 1",
        r"optim.layer_decay=1 +number > 0 and <= 1",
        r"data.hflip=null +true \| false \| null",
        r"data.img_size=null +integer \| \[integer, ...\] \| null",
        r"views.blur=true +true \| false",
        r"backbone.patch_size=auto +integer >= 1 \| auto \| null",
        r"objective.tasks \(required\) +\[text, ...\]",
    ):
        assert re.search(f"^  {line}$", text, re.MULTILINE), line


def test_every_default_of_the_help_can_be_typed_back():
    for (section, cls, name), part in zip(SECTIONS, parts(reference.help_text()), strict=True):
        defaults = {key: s.default for key, s in settings_of(section, cls).items() if s.default is not MISSING}
        found = {}
        for line in typed(part):
            recipe = read(recipes.recipes_of(name)[0] if name else "mae", "train.flops=1", line)
            key = line.partition("=")[0]
            found[key] = getattr(getattr(recipe, section), key.partition(".")[2])
        assert found == defaults


@pytest.mark.parametrize("name", RECIPES)
def test_help_of_a_recipe_is_the_recipe(name, printed):
    """Each printed setting is accepted; all of them make of another recipe of the objective this one."""
    recipe = read(name)
    text = printed("--recipe", name, "--help")
    assert max(map(len, text.splitlines())) <= 80
    lines = typed(text)
    settings = {key for section in recipes.SECTIONS for key in settings_of(section, recipes.SECTIONS[section])}
    settings |= {"objective.name", *settings_of("objective", type(recipe.objective))}
    assert {line.partition("=")[0] for line in lines} == settings and len(lines) == len(settings)
    for line in lines:
        read(name, line)
    others = [other for other in recipes.recipes_of(recipe.objective_name) if other != name] or [name]
    again = read(others[0], *lines)
    assert again.as_dict() | dict(recipe=name) == recipe.as_dict()
    tree = yaml.safe_load(recipes.find(name).read_text())
    own = {f"{section}.{key}" for section, part in tree.items() for key in part}
    assert {line.partition("=")[0] for line, mark in lines.items() if mark == "*"} == own


def test_help_tells_recipe_command_line_and_default_apart(printed):
    text = printed("--recipe", "mae", "optim.lr=3", "--data", "cifar10", "-h", "backbone.init_from=a b")
    lines = typed(text)
    assert lines["optim.lr=3"] == lines["data.name=cifar10"] == lines["backbone.init_from=a b"] == ">"
    assert lines["optim.lr_rule=B/256"] == "*" and lines["optim.clip_grad=null"] == " "
    assert re.search(r"^> optim.lr=3 +number > 0 \(default 0.001\)$", text, re.MULTILINE)
    assert re.search(r"^\* objective.mask_ratio=0.75 +number > 0 and <= 1$", text, re.MULTILINE)
    assert "norm_last_layer" not in text and "MAE: drop 75 %" in text


def test_help_of_a_run_and_of_a_file_without_a_comment(printed, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(read("dino", "data.subset=10").as_dict() | dict(resolved={}, images=dict(count=9)))
    )
    lines = typed(printed("--recipe", str(tmp_path / "recipe.yaml"), "--help"))
    assert lines["data.subset=10"] == "*" and lines["objective.norm_last_layer=true"] == "*"
    assert read("dino", *lines).as_dict() == read("dino", "data.subset=10").as_dict()


def test_no_recipe_is_refused_and_a_faulty_one_has_no_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ssl_vit/pretrain.py", "train.steps=3"])
    with pytest.raises(SystemExit) as ended:
        pretrain.main()
    assert ended.value.code == 2 and "required: --recipe" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["ssl_vit/pretrain.py", "--recipe", "mae", "lr=3", "--help"])
    with pytest.raises(UserError, match="'optim.lr'"):
        pretrain.main()


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "null"),
        (True, "true"),
        (0, "0"),
        (10.0, "10"),
        (0.05, "0.05"),
        (1e-6, "1e-6"),
        (1e13, "1e13"),
        (0.1 + 0.2, "0.30000000000000004"),
        ([0.9, 0.95], "[0.9,0.95]"),
        ([], "[]"),
        ("auto", "auto"),
        ("2024", '"2024"'),
        ("null", '"null"'),
        ("", '""'),
        ("a: b", '"a: b"'),
        (["mae", "simmim objective.noise_sigma=[0,1]", "a,b"], '[mae,"simmim objective.noise_sigma=[0,1]","a,b"]'),
    ],
)
def test_values_are_written_as_yaml_reads_them(value, text):
    assert write(value) == text
    again = yaml.safe_load(text)
    assert again == value or (isinstance(value, float) and float(again) == value)


def test_arguments_are_quoted_for_the_shell_where_they_must():
    assert argument("optim.betas", [0.9, 0.95]) == "optim.betas=[0.9,0.95]"
    assert argument("optim.lr_rule", "sqrt(B/1024)") == "'optim.lr_rule=sqrt(B/1024)'"
    assert shlex.split(argument("data.name", "it's $HOME")) == ["data.name=it's $HOME"]


# -- JSON Schema ------------------------------------------------------------------------------------------------------

TYPES = dict(object=dict, array=list, string=str, boolean=bool, null=type(None), integer=int, number=(int, float))
NOTES = {"$schema", "title", "description", "default"}


def fits(value, schema) -> bool:
    """Whether a value is valid, by the rules of draft 2020-12 for the keywords that the schema may hold."""
    if isinstance(schema, bool):
        return schema
    number = isinstance(value, int | float) and not isinstance(value, bool)
    properties = schema.get("properties", {})
    checks = {
        "type": lambda name: of_type(value, name),
        "enum": lambda options: any(value == o and isinstance(value, type(o)) for o in options),
        "const": lambda option: value == option,
        "anyOf": lambda schemas: any(fits(value, s) for s in schemas),
        "allOf": lambda schemas: all(fits(value, s) for s in schemas),
        "if": lambda condition: not fits(value, condition) or fits(value, schema["then"]),
        "then": lambda _: True,
        "required": lambda keys: not isinstance(value, dict) or value.keys() >= set(keys),
        "properties": lambda _: (
            not isinstance(value, dict)
            or all(fits(value[key], properties[key]) for key in value.keys() & properties.keys())
        ),
        "additionalProperties": lambda more: not isinstance(value, dict) or more or value.keys() <= properties.keys(),
        "items": lambda of: not isinstance(value, list) or all(fits(item, of) for item in value),
        "minimum": lambda bound: not number or value >= bound,
        "maximum": lambda bound: not number or value <= bound,
        "exclusiveMinimum": lambda bound: not number or value > bound,
    }
    assert schema.keys() <= checks.keys() | NOTES, "a keyword that is not checked here"
    return all(checks[keyword](content) for keyword, content in schema.items() if keyword not in NOTES)


def of_type(value, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, TYPES[name]) or (name == "integer" and isinstance(value, float) and value.is_integer())


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_fit_the_schema(name):
    schema, tree = reference.json_schema(), yaml.safe_load(recipes.find(name).read_text())
    assert fits(tree, schema)
    full = read(name).as_dict()
    assert fits({section: part for section, part in full.items() if section != "recipe"}, schema)
    for section, part in tree.items():
        assert not fits(tree | {section: part | dict(colours=3)}, schema)
        for key, value in part.items():
            assert not fits(tree | {section: part | {key: dict(value=value)}}, schema), (section, key)
    assert not fits(tree | dict(colours={}), schema) and not fits(tree | dict(train=3), schema)


def test_the_schema_knows_each_objective_s_own_settings(printed):
    schema = json.loads(printed("--print-schema"))
    assert schema == json.loads(json.dumps(reference.json_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert not fits({}, schema) and not fits(dict(objective={}), schema)
    assert not fits(dict(objective=dict(name="mea")), schema)
    assert fits(dict(objective=dict(name="dino", norm_last_layer=True)), schema)
    assert not fits(dict(objective=dict(name="dino", decoder_depth=2)), schema)
    assert fits(dict(objective=dict(name="reconstruct", decoder_depth=2)), schema)
    assert not fits(dict(objective=dict(name="multitask", mix="all")), schema)  # tasks must be given
    assert fits(dict(objective=dict(name="multitask", tasks=["mae", "dino"])), schema)


VALUES = [None, True, False, 0, 1, 2, -1, 7, 0.5, 1.5, -0.1, 0.99, 1.0, 300.0, 10**9, "auto", "mae", "hwc", "no", ""]
VALUES += [[], [0.5], [1, 2], [-1, 0.2], ["mae"], [None], [True, 1], [1, [2]], {}, dict(name="x")]


@pytest.mark.parametrize("one, objective", SETTINGS, ids=[f"{o or ''}{s.key}" for s, o in SETTINGS])
def test_the_schema_of_a_setting_agrees_with_its_check(one, objective):
    """For values of every kind; the check alone takes numbers as text, as YAML 1.1 reads 1e-4."""
    schema = one.json_schema()
    options = [o for s in schema.get("anyOf", [schema]) for o in s.get("enum", [])]
    bounds = [b for b in (one.above, one.at_least, one.at_most) if b is not None]
    near = [b + step for b in bounds for step in (-1, -0.001, 0, 0.001, 1)]
    taken = 0
    for value in [*VALUES, *options, *near, *([n] for n in near)]:
        try:
            one.check(value, "here")
        except UserError:
            accepted = False
        else:
            accepted = True
        assert fits(value, schema) == accepted, value
        taken += accepted
    assert 0 < taken
    assert "default" not in schema or fits(schema["default"], schema)
    assert schema["description"].startswith(one.help)


def test_infinity_is_refused_by_the_check():
    one = settings_of("optim", recipes.Optim)["optim.lr"]
    for value in (math.inf, math.nan, "1e999"):
        with pytest.raises(UserError, match="finite"):
            one.check(value, "here")


# -- docs/settings.md -------------------------------------------------------------------------------------------------


def test_the_page_of_settings_is_up_to_date():
    page = Path(__file__).parent.parent / "docs" / "settings.md"
    assert page.read_text() == reference.page(), "run: python -m ssl_vit.reference > docs/settings.md"


def test_the_page_has_a_row_of_four_cells_for_every_setting():
    rows = [line for line in reference.page().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [s.key for s, _ in SETTINGS]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {6}
    assert "| `optim.warmup_fraction` | `0.05` | `number 0 to 1` | fraction of the steps with linear warm-up |" in rows
    assert sum("| required |" in row for row in rows) == 1
