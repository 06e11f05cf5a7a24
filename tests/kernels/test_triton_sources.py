"""What the sources of the Triton kernels keep to, so that Triton 3.6, which torch 2.11 brings, compiles them too.

There a function that is compiled, Triton's own `tl.zeros` among them, takes no plain value that is an attribute of a
constant inside a tuple, and no dataclass that is one. A constant with a name of its own passes: `KEYS = BLOCKS.keys`.
Newer versions take both, so that nothing else shows it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def functions(tree: ast.Module, decorator: str) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in tree.body:
        if any(decorator in ast.unparse(each) for each in getattr(node, "decorator_list", ())):
            yield node


TREES = {path.relative_to(KERNELS): ast.parse(path.read_text("utf-8")) for path in sorted(KERNELS.rglob("*.py"))}
COMPILED = {function.name for tree in TREES.values() for function in functions(tree, "triton.jit")} | {"zeros"}
DATACLASSES = [each for tree in TREES.values() for each in functions(tree, "dataclass")]
NESTED = {
    field.target.id
    for each in DATACLASSES
    for field in each.body
    if isinstance(field, ast.AnnAssign)
    and {name.name for name in DATACLASSES} & set(ast.unparse(field.annotation).split())
}
"""Fields of dataclasses that are dataclasses."""


def is_of_a_constant(node: ast.AST) -> bool:
    """`TILING.head_dim`, `BLOCKS.keys.row`: an attribute of a name in capitals."""
    while isinstance(node, ast.Attribute):
        node = node.value
        if isinstance(node, ast.Name):
            return node.id.isupper()
    return False


def refused(call: ast.Call) -> list[str]:
    """Arguments that Triton 3.6 does not hand on."""
    return [
        ast.unparse(argument)
        for argument in call.args
        if (isinstance(argument, ast.Tuple) and any(map(is_of_a_constant, argument.elts)))
        or (isinstance(argument, ast.Attribute) and is_of_a_constant(argument) and argument.attr in NESTED)
    ]


def calls_of(tree: ast.Module) -> Iterator[ast.Call]:
    for function in functions(tree, "triton.jit"):
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in COMPILED:
                yield node


@pytest.mark.parametrize("path", [path for path, tree in TREES.items() if any(calls_of(tree))], ids=str)
def test_constants_are_handed_on_as_every_triton_takes_them(path):
    assert [(ast.unparse(call), found) for call in calls_of(TREES[path]) if (found := refused(call))] == []


@pytest.mark.parametrize(
    ("source", "is_refused"),
    [
        ("tl.zeros((TILING.block_d, N), tl.float32)", True),
        ("tl.zeros((BLOCK, N), tl.float32)", False),
        ("quantize_rows(load, BLOCKS.keys.row)", True),
        ("quantize_rows(load, ROW, BLOCKS.page_tokens)", False),
    ],
)
def test_what_is_refused(source, is_refused):
    assert bool(refused(ast.parse(source, mode="eval").body)) == is_refused
