"""One setting: its type, bounds and meaning; how its value is checked, and written on the command line.

Settings are the fields of dataclasses, which ssl_vit/recipe.py and the objectives declare.
"""

import json
import math
import re
import shlex
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypeVar, Union

import yaml

from ssl_vit.errors import UserError

T = TypeVar("T")


def known(value: T | None) -> T:
    """A value that may be None elsewhere and is not here, such as a setting that the run has resolved."""
    assert value is not None
    return value


def pair(values: Sequence[T]) -> tuple[T, T]:
    """A list that holds two values, as a setting for a range or a size does."""
    first, second = values
    return first, second


class ReadIf(NamedTuple):
    """When a setting is read at all: in words, and by the section that it is of."""

    words: str
    told: Callable[[Any], bool]


def setting(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    read_if: ReadIf | None = None,
) -> Any:
    """A dataclass field with its meaning and its bounds. default: MISSING for a setting that a recipe must give."""
    metadata = dict(help=help, above=above, at_least=at_least, at_most=at_most, read_if=read_if)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """A setting by its key, section.name. default: MISSING if a recipe must give it."""

    key: str
    kind: Any  # the field's annotation: bool, int, float, str, None, Literal, list of one of these, or a union
    default: Any
    help: str
    above: float | None
    at_least: float | None
    at_most: float | None
    read_if: ReadIf | None  # None: always

    def check(self, value: Any, source: str) -> Any:
        """The value in the setting's type. source: where it came from. Raises UserError, naming key and source."""
        try:
            value = _coerce(self.kind, value)
        except (ValueError, OverflowError):
            hint = ""
            if str in (self.kind, *typing.get_args(self.kind)) and not isinstance(value, list | dict | types.NoneType):
                hint = f' Quote it: {self.key}=\'"{value}"\' on the command line, "{value}" in a file.'
            raise UserError(f"{self.key} in {source} must be {_in_words(self.kind)}, not {value!r}.{hint}") from None
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                self._check_bounds(number, source)
        return value

    def _check_bounds(self, number: float, source: str) -> None:
        for word, bad in (
            ("finite", not math.isfinite(number)),
            (f"above {self.above}", self.above is not None and number <= self.above),
            (f"at least {self.at_least}", self.at_least is not None and number < self.at_least),
            (f"at most {self.at_most}", self.at_most is not None and number > self.at_most),
        ):
            if bad:
                raise UserError(f"{self.key} in {source} must be {word}, not {number}.")

    def allowed(self) -> str:
        """What the value may be, as one types it: `number > 0 | null`, `auto | fp32 | bf16`, `0 to 1`."""
        if self.at_least is not None and self.at_most is not None:
            bounds = f" {write(self.at_least)} to {write(self.at_most)}"
        else:
            signs = {">": self.above, ">=": self.at_least, "<=": self.at_most}
            bounds = " and".join(f" {sign} {write(bound)}" for sign, bound in signs.items() if bound is not None)
        return " | ".join(_in_symbols(kind, bounds) for kind in _alternatives(self.kind))

    def json_schema(self) -> dict[str, Any]:
        """The setting as JSON Schema."""
        limits = dict(exclusiveMinimum=self.above, minimum=self.at_least, maximum=self.at_most)
        bounds = {keyword: limit for keyword, limit in limits.items() if limit is not None}
        kinds = [_json_schema(kind, bounds) for kind in _alternatives(self.kind)]
        schema = dict(description=f"{self.help} ({self.allowed()})", default=self.default)
        if self.default is MISSING:
            del schema["default"]
        return schema | (kinds[0] if len(kinds) == 1 else dict(anyOf=kinds))


def settings_of(section: str, cls: type[Any]) -> dict[str, Setting]:
    """The settings of a section's dataclass, by key."""
    kinds = typing.get_type_hints(cls)
    found = {}
    for f in fields(cls):
        key = f"{section}.{f.name}"
        default = f.default if f.default_factory is MISSING else f.default_factory()
        found[key] = Setting(key, kinds[f.name], default, **f.metadata)
    return found


def write(value: Any) -> str:
    """A value in one line of YAML, such as null, true, 0.05, [0.9,0.95]: what `key=value` takes."""
    if isinstance(value, list):
        return f"[{','.join(_write_item(item) for item in value)}]"
    if isinstance(value, str):
        return value if _reads_as(value, value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        # shortest of 0.05, 1e-4 and 10: data.subset would refuse 10.0
        text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
        return re.sub(r"e\+?(-?)0*", r"e\1", text)
    return json.dumps(value)


def argument(key: str, value: Any) -> str:
    """`key=value` as one types it into a shell; quoted where a shell would read it in another way."""
    text = f"{key}={write(value)}"
    return text if re.fullmatch(r"[\w.,:+/@%=\[\]-]+", text) else shlex.quote(text)


def _write_item(value: Any) -> str:
    """A value within a list, where commas and brackets divide."""
    text = write(value)
    return text if not isinstance(value, str) or _reads_as(f"[{text}]", [value]) else json.dumps(value)


def _reads_as(text: str, value: Any) -> bool:
    try:
        return bool(yaml.safe_load(text) == value)
    except (ValueError, yaml.YAMLError):
        return False


def _coerce(kind: Any, value: Any) -> Any:
    """The value in that type. Raises ValueError or OverflowError if it has another."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _coerce(option, value)
            except ValueError:
                pass
        raise ValueError
    if origin is Literal:
        valid = value in args
    elif origin is list:
        valid = isinstance(value, list)
        value = [_coerce(args[0], v) for v in value] if valid else value
    else:
        value = _number(kind, value) if kind in (int, float) else value
        valid = isinstance(value, bool) == (kind is bool) and isinstance(value, kind)
    if not valid:
        raise ValueError
    return value


def _number(kind: type, value: Any) -> Any:
    """A number, or a text that is one (YAML 1.1 reads 1e-4 as a text), as that type where it has the same value."""
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, str | float) and float(value).is_integer():
        return int(float(value))
    return value


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _in_words(kind: Any) -> str:
    """A type in a sentence."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(a) for a in args)
    if origin is Literal:
        *others, last = map(str, args)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is list:
        return f"a list of {_in_words(args[0])}"
    names = {int: "a whole number", float: "a number", str: "a word", bool: "true or false", type(None): "null"}
    return names[kind]


def _in_symbols(kind: Any, bounds: str) -> str:
    """A type that is not a union, in help texts."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(map(write, args))
    if origin is list:
        return f"[{_in_symbols(args[0], bounds)}, ...]"
    names = {int: f"integer{bounds}", float: f"number{bounds}", str: "text", bool: "true | false", type(None): "null"}
    return names[kind]


def _json_schema(kind: Any, bounds: dict[str, float]) -> dict[str, Any]:
    """A type that is not a union, as JSON Schema."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return dict(enum=list(args))
    if origin is list:
        return dict(type="array", items=_json_schema(args[0], bounds))
    names = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    return dict(type=names[kind]) | (bounds if kind in (int, float) else {})
