"""YAML as people write it, and strictly: no key twice, no text that builds objects, and each error with its line."""

import re
from typing import Any

import yaml

from diffdfkd.engine.errors import UserError

TEXT, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """1e-3 is a number, which YAML 1.1 reads as a string for want of a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+$"), list("+-.0123456789")
)


def parse_yaml(text: str, name: str) -> Any:
    """Content of a YAML text; raises UserError that begins with ``name`` and says the line.

    Refused beside what is no YAML: a key that stands twice, of which PyYAML would take the last in silence, a key that
    is no text, an alias inside of what it stands for, and tags that would make Python objects.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, name, ())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not a YAML file: {_problem(error)}") from None
    except RecursionError:
        raise UserError(f"{name}: not a YAML file: it is nested too deeply; a recipe has three levels") from None


def _check(node: yaml.Node, name: str, above: tuple[yaml.Node, ...]) -> None:
    """Refuse what the loader takes: see `parse_yaml`."""
    if any(node is outer for outer in above):
        raise UserError(f"{name}: {_line(node)}: an alias stands inside of itself; write out what is meant")
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check(child, name, (*above, node))
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, yaml.Node] = {}
    for key, child in node.value:
        _check(child, name, (*above, node))
        if key.tag == MERGE:
            continue
        if key.tag != TEXT:
            written = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise UserError(f"{name}: {written}: a field's name is text ({_line(key)}); put it in quotes, if it is one")
        if key.value in first:
            raise UserError(
                f"{name}: {key.value}: given twice, in {_line(first[key.value])} and in {_line(key)}; keep one of them"
            )
        first[key.value] = key


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _problem(error: yaml.YAMLError) -> str:
    """What PyYAML says, in one line and with the place first."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    problem = str(getattr(error, "problem", None) or getattr(error, "context", None) or "cannot be read")
    cure = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}{cure}"
