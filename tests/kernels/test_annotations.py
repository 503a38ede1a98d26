"""Types on every function of kernels/ that is not a Triton kernel: mypy is told to let those pass."""

import ast
from pathlib import Path

import diffdfkd.kernels.launch

FOLDER = Path(diffdfkd.kernels.launch.__file__).parent


def untyped(source: str) -> list[str]:
    """Functions that are no kernels and lack the type of a parameter or of their result."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or any(
            ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
        ):
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        given += [argument for argument in (node.args.vararg, node.args.kwarg) if argument is not None]
        bare = [one.arg for one in given if one.annotation is None and one.arg not in ("self", "cls", "ctx")]
        if bare or node.returns is None:
            found.append(node.name)
    return found


def test_functions_beside_the_kernels_have_types() -> None:
    sources = list(FOLDER.glob("*.py"))
    assert len(sources) > 5
    assert {path.name: names for path in sources if (names := untyped(path.read_text(encoding="utf-8")))} == {}


def test_the_test_sees_a_missing_type() -> None:
    assert untyped(
        "def f(x) -> int: ...\n@triton.jit\ndef k(x): ...\n@triton.jit(debug=True)\ndef l(x): ...\ndef g(x: int): ...\n"
    ) == ["f", "g"]
