"""Reading YAML safely and saying in one line what is wrong with a configuration."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

MAX_YAML_BYTES = 256 << 10
"""PyYAML reads some 100 KiB a second."""
MAX_DIGITS = 18
"""Of a whole number: what is longer may not fit into 64 bits."""
MAX_OVERRIDE_DEPTH = 10
_NEXT = "; allowed: plain YAML, with quotes around text that has special characters"
_SECRET = re.compile(r"(?<=://)[^/\s'\"]+(?=@)|(?<=password=)[^&\s'\"]+")
"""User and password in an address, also where there is more than one @."""


class ConfigError(ValueError):
    """A wrong key or value; the message is what the user sees, one line per problem."""


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, larger than 256 KiB, not UTF-8, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; allowed: a readable YAML file") from None
    except ValueError as error:  # a NUL character
        raise ConfigError(f"{_shown(str(path))}: {error}; allowed: a readable YAML file") from None
    if len(raw) > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_YAML_BYTES >> 10} KiB; allowed: a configuration file")
    try:
        return parse_yaml(raw.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; allowed: a YAML file") from None


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: 1e-5 is a number, 017 is 17, `no` and 2020-01-01 are text.

    Without aliases (a few nested ones can fill the memory), tags, merge keys, repeated keys and halves of
    surrogate pairs, which are no characters.
    """

    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="tags are not allowed", problem_mark=mark)
        if isinstance(event, yaml.ScalarEvent) and not _is_unicode(event.value):
            raise yaml.MarkedYAMLError(problem=f"{_shown(event.value)} is not Unicode text", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_integer(self, node: Any) -> int:
        text = node.value
        if len(text.lstrip("+-")) > MAX_DIGITS:
            problem = f"a whole number of more than {MAX_DIGITS} digits"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {_shown(key)} is not text", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {_shown(key)} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


for _name, _pattern in {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "null": r"~|null|Null|NULL|",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}.items():
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), None)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_integer)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in YAML text; `where` names the text in errors.

    Raises:
        ConfigError: not YAML, or not a mapping with text keys.
    """
    tree = _load(text, where)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        words = {list: "a list", str: "text", bool: "true or false"}.get(type(tree), "a number")
        raise ConfigError(f"{where}: the top level is {words}; allowed: a mapping of sections")
    return tree


def _load(text: str, where: str) -> Any:
    """The value of YAML text; every way in which it can be malformed is one line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: nested too deeply{_NEXT}") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}:{line} not valid YAML: {problem}{_NEXT}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: not valid YAML: {str(error).splitlines()[0]}{_NEXT}") from None


def set_dotted(tree: dict[str, Any], override: str) -> None:
    """Put `a.b=value` into `tree` in place; the value is read as YAML.

    Raises:
        ConfigError: no `=`, an empty key, too deep a one, or one below something that is not a section.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not _is_unicode(override):
        raise ConfigError(f"override {_shown(override)}: not UTF-8 text; allowed: key.subkey=value")
    if len(parts) > MAX_OVERRIDE_DEPTH:
        raise ConfigError(f"override {_shown(override)}: nested too deeply; allowed: key.subkey=value")
    if not equals or not all(parts):
        raise ConfigError(f"override {_shown(override)}; allowed: key.subkey=value")
    value = _load(text, f"override {_shown(override)}")
    node = tree
    for depth, part in enumerate(parts[:-1], start=1):
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            above = ".".join(parts[:depth])
            raise ConfigError(f"override {_shown(override)}: {above} is not a section; allowed: {above}=value")
    node[parts[-1]] = value


def validation_lines(error: ValidationError, root: type[BaseModel], where: Callable[[list[Any]], str]) -> list[str]:
    """One line per problem: where the key was set (`where` of its path), key, value, what is allowed."""
    lines = []
    for problem in error.errors():
        loc = list(problem["loc"])
        if problem["type"] == "value_error" and not loc:  # conflicts, one a line, each beginning with its key
            conflicts = str(problem["ctx"]["error"]).splitlines()
            lines += [f"{where(text.partition(':')[0].split('.'))}: {text}" for text in conflicts]
        else:
            lines.append(f"{where(loc)}: {_line(problem, loc, root)}")
    return lines


def _line(problem: Any, loc: list[Any], root: type[BaseModel]) -> str:
    key = ".".join(_shown_key(part) for part in loc)
    model, field = _find(root, loc)
    if problem["type"] == "extra_forbidden" and model is not None:
        names = list(model.model_fields)
        near = difflib.get_close_matches(str(loc[-1]), names, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return f"{key}: unknown key; {hint}allowed: {', '.join(names)}"
    is_entry = isinstance(loc[-1], int) and field is not None
    allowed = _words(get_args(field.annotation)[0]) if is_entry and field else describe(field)
    if problem["type"] == "missing":
        return f"{key}: missing; required: {allowed}"
    if problem["type"] == "finite_number":
        allowed = allowed.replace("a number", "a finite number")
    return f"{key}: got {_shown(problem['input'])}; allowed: {allowed}"


def _is_unicode(text: str) -> bool:
    """Whether it can be encoded: without surrogates, which YAML escapes and undecodable arguments bring in."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _shown_key(part: Any) -> str:
    """One part of a key's path; what only looks like Latin letters is escaped, so that it shows."""
    if isinstance(part, str) and re.fullmatch(r"[\w-]{1,60}", part, re.ASCII):
        return part
    return _shown(part) if not isinstance(part, str) or part.isascii() else ascii(part[:60])


def masked(text: str) -> str:
    """`text` with *** for users and passwords in addresses."""
    return _SECRET.sub("***", text)


def _shown(value: Any) -> str:
    """A value as one short line, in YAML's words, without passwords in addresses."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = masked(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _find(root: type[BaseModel], loc: list[Any]) -> tuple[type[BaseModel] | None, FieldInfo | None]:
    """The model that holds the last part of `loc`, and that part's field where it has one."""
    model: type[BaseModel] | None = root
    holder, field = model, None
    for part in loc:
        if model is None:
            break
        if not isinstance(part, str):
            continue
        holder, field = model, model.model_fields.get(part)
        model = submodel(field.annotation) if field else None
    return holder, field


def submodel(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in get_args(annotation):
        found = submodel(arg)
        if found is not None:
            return found
    return None


_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def describe(field: FieldInfo | None) -> str:
    """What a field takes, in words: its title where it has one, else such as `a whole number > 0`."""
    if field is None:
        return "a known key"
    return _words(field.annotation, [field])


def _words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    infos = [item for item in metadata if isinstance(item, FieldInfo)]
    for info in infos:
        if info.title:
            return info.title
    constraints = [item for info in infos for item in info.metadata]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(args[0], args[1:])
    if origin is list:
        return f"a list {_size(constraints)}, each {_words(args[0])}".replace(" ,", ",")
    return " ".join([_type_words(annotation), *_bounds(constraints)])


def _size(constraints: list[Any]) -> str:
    sizes = {name: size for item in constraints for name, size in _attributes(item) if name.endswith("_length")}
    if not sizes:
        return ""
    least, most = sizes.get("min_length", 0), sizes.get("max_length")
    count = f"exactly {least}" if least == most else f"at least {least}"
    return f"with {count} {'entry' if least == 1 else 'entries'}"


def _type_words(annotation: Any) -> str:
    if annotation in _NAMES:
        return _NAMES[annotation]
    args = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(repr(a) for a in args)
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_words(a) for a in sorted(args, key=lambda a: a is not type(None)))
    section = submodel(annotation)
    if section is not None:
        return f"a section with the keys {', '.join(section.model_fields)}"
    return str(annotation)


def _bounds(constraints: list[Any]) -> list[str]:
    """`>= 0`, `and < 1`."""
    found = [f"{_BOUNDS[name]} {bound}" for item in constraints for name, bound in _attributes(item) if name in _BOUNDS]
    return found[:1] + [f"and {text}" for text in found[1:]]


def _attributes(constraint: Any) -> list[tuple[str, Any]]:
    """The set attributes of a constraint such as `annotated_types.Ge`."""
    fields = dataclasses.fields(constraint) if dataclasses.is_dataclass(constraint) else []
    return [(f.name, getattr(constraint, f.name)) for f in fields]
