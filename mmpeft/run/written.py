"""Methods as a user writes them: a call as in Python, a name, a mapping, or a YAML file that holds one of these."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields

import yaml

from mmpeft.errors import ConfigError, nearest
from mmpeft.methods import METHODS, Method
from mmpeft.methods.spec import from_spec
from mmpeft.run.shipped import SUFFIXES, find_config
from mmpeft.types import Json, Leaf

KEYS = ("method", "text_method")
"""Keys of a configuration that hold a method."""

FORM = "expected a method such as LoRA, 'LoRA(rank=8, at=\"attn.*\") + BitFit()', or a YAML file that names one"


def read_method(text: str) -> Method:
    """The method that a text stands for; nothing in it is run.

    Raises:
        ConfigError: it is no method, or an unknown one, or a field is wrong.
    """
    if text.endswith(SUFFIXES):
        try:
            return from_spec(_spec(yaml.safe_load(find_config(text).read_text("utf-8")), text))
        except yaml.YAMLError as error:
            raise ConfigError(f"{text} is no YAML: {' '.join(str(error).split())}") from error
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ConfigError(f"cannot read the method {text!r}: {error.msg}; {FORM}") from error
    found = _value(tree, text)
    if not isinstance(found, Method):
        raise ConfigError(f"{text!r} is no method; {FORM}")
    return found


def as_class(method: Method) -> Json:
    """A method as a parser of classes takes it: `{"class_path": "LoRA", "init_args": {"rank": 8}}`."""
    own = {field.name: _class_form(getattr(method, field.name)) for field in fields(method) if field.init}
    return {"class_path": f"{type(method).__module__}.{type(method).__qualname__}", "init_args": own}


def _class_form(value: object) -> object:
    if isinstance(value, Method):
        return as_class(value)
    if isinstance(value, list | tuple):
        return [_class_form(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def spelled_out(content: Leaf) -> Leaf:
    """A configuration in which each `method` that is written as a call is a class with its arguments."""
    if isinstance(content, list):
        return [spelled_out(item) for item in content]
    if not isinstance(content, dict):
        return content
    return {
        key: as_class(read_method(value)) if key in KEYS and is_call(value) else spelled_out(value)
        for key, value in content.items()
    }


def is_call(value: object) -> bool:
    """Whether a value is a method written as in Python, such as `LoRA(rank=8) + BitFit()`, and not just a name."""
    return isinstance(value, str) and ("(" in value or "+" in value)


def _spec(content: object, text: str) -> Json:
    """Data as `to_spec` writes them, of those or of a configuration with `class_path` and `init_args`."""
    if isinstance(content, Mapping) and isinstance(content.get("method"), str | Mapping):
        content = content["method"]
    if isinstance(content, str):
        return {"name": content.rpartition(".")[2]}
    if isinstance(content, Mapping) and "class_path" in content:
        own = {key: _inner(value, text) for key, value in (content.get("init_args") or {}).items()}
        return {"name": str(content["class_path"]).rpartition(".")[2], **own}
    if isinstance(content, Mapping) and "name" in content:
        return dict(content)
    raise ConfigError(f"{text} names no method; {FORM}")


def _inner(value: object, text: str) -> object:
    if isinstance(value, list):
        return [_inner(item, text) for item in value]
    return _spec(value, text) if isinstance(value, Mapping) and "class_path" in value else value


def _value(node: ast.expr, text: str) -> Leaf:
    """A method, or the value of one of its fields."""
    if isinstance(node, ast.Name):
        return from_spec({"name": node.id})
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _value(node.left, text), _value(node.right, text)
        if isinstance(left, Method) and isinstance(right, Method):
            return left + right
    if isinstance(node, ast.Call):
        return _called(node, text)
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, text) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ConfigError(f"cannot read {ast.unparse(node)!r} in {text!r}; {FORM}") from None


def _called(node: ast.Call, text: str) -> Method:
    if any(keyword.arg is None for keyword in node.keywords):
        raise ConfigError(f"cannot read ** in {text!r}; {FORM}")
    given = [_value(argument, text) for argument in node.args]
    named = {str(keyword.arg): _value(keyword.value, text) for keyword in node.keywords}
    if isinstance(node.func, ast.Attribute) and node.func.attr == "where":
        inner = _value(node.func.value, text)
        if isinstance(inner, Method) and len(given) == 1 and isinstance(given[0], str) and not named:
            return inner.where(given[0])
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    known = [field.name for field in fields(METHODS[name])] if name in METHODS else []
    if len(given) > len(known) and name in METHODS:
        raise ConfigError(f"{name} has {len(known)} fields ({', '.join(known)}), got {len(given)} values")
    if name not in METHODS:
        raise ConfigError(f"unknown method {name or ast.unparse(node.func)!r}.{nearest(name, METHODS)} {FORM}")
    return from_spec({"name": name, **dict(zip(known, given)), **named})
