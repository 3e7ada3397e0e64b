"""Reading YAML safely and saying in one line what is wrong with a configuration."""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

MAX_YAML_BYTES = 1 << 20


class ConfigError(ValueError):
    """A wrong key or value; the message is what the user sees, one line per problem."""


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, larger than 1 MiB, not UTF-8, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{path}: larger than 1 MiB; allowed: a configuration file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; allowed: a readable YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; allowed: a YAML file") from None
    return parse_yaml(text, str(path))


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases (a few nested ones can fill the memory) and without repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, typing.Hashable) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key}' stands twice", problem_mark=key_node.start_mark)
            if isinstance(key, typing.Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in YAML text; `where` names the text in errors.

    Raises:
        ConfigError: not YAML, or not a mapping with text keys.
    """
    try:
        tree = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"{where}:{line} not valid YAML: {problem}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict) or not all(isinstance(k, str) for k in tree):
        raise ConfigError(f"{where}: the top level is a {type(tree).__name__}; allowed: a mapping of sections")
    return tree


def set_dotted(tree: dict[str, Any], override: str) -> None:
    """Put `a.b=value` into `tree` in place; the value is read as YAML.

    Raises:
        ConfigError: no `=`, an empty key, or a key below something that is not a section.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override '{override}'; allowed: key.subkey=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: got '{text}', not a YAML value") from None
    if isinstance(value, str):
        value = _number(value)
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override '{override}': {part} is not a section")
    node[parts[-1]] = value


def _number(text: str) -> str | float:
    """YAML 1.1 reads 1e-5 as text; users mean the number."""
    try:
        return float(text) if "e" in text.lower() else text
    except ValueError:
        return text


def validation_lines(error: ValidationError, root: type[BaseModel], where: str) -> list[str]:
    """One line per problem: file, key, value, what is allowed."""
    lines = []
    for problem in error.errors():
        loc = list(problem["loc"])
        if problem["type"] == "value_error" and not loc:
            lines.append(f"{where}: {problem['ctx']['error']}")
            continue
        lines.append(f"{where}: {_line(problem, loc, root)}")
    return lines


def _line(problem: Any, loc: list[Any], root: type[BaseModel]) -> str:
    key = ".".join(str(p) for p in loc)
    model, field = _find(root, loc)
    if problem["type"] == "extra_forbidden" and model is not None:
        names = list(model.model_fields)
        near = difflib.get_close_matches(str(loc[-1]), names, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return f"{key}: unknown key; {hint}allowed: {', '.join(names)}"
    if problem["type"] == "missing":
        return f"{key}: missing; allowed: {describe(field)}"
    return f"{key}: got {_shown(problem['input'])}; allowed: {describe(field)}"


def _shown(value: Any) -> str:
    text = repr(value)
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
        model = _submodel(field.annotation) if field else None
    return holder, field


def _submodel(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in get_args(annotation):
        found = _submodel(arg)
        if found is not None:
            return found
    return None


_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def describe(field: FieldInfo | None) -> str:
    """What a field takes, in words: `a whole number > 0`, `'error' or 'skip'`."""
    if field is None:
        return "a known key"
    bounds = list(_bounds(field.metadata))
    words = _type_words(field.annotation)
    return " and ".join([f"{words} {bounds[0]}", *bounds[1:]]) if bounds else words


def _bounds(metadata: list[Any]) -> typing.Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
            continue
        for name, sign in _BOUNDS.items():
            bound = getattr(item, name, None)
            if bound is not None:
                yield f"{sign} {bound}"
        if getattr(item, "min_length", None):
            yield f"with at least {item.min_length} entry"
        pattern = getattr(item, "pattern", None)
        if pattern:
            yield f"of the form {pattern}"


def _type_words(annotation: Any) -> str:
    if annotation in _NAMES:
        return _NAMES[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return " ".join([_type_words(args[0]), *_bounds(list(args[1:]))])
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_words(a) for a in args)
    if origin is list:
        return f"a list of {_type_words(args[0])}"
    if origin is tuple:
        return f"{len(args)} values, each {_type_words(args[0])}"
    if _submodel(annotation) is not None:
        return f"a section with the keys {', '.join(_submodel(annotation).model_fields)}"  # type: ignore[union-attr]
    return str(annotation)
