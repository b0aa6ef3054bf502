"""Imports run one way, so that each part can be read, tested and deleted without the ones above it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "tightrope"

# Who stands on whom: a part may import itself and every part of an earlier row.
ROWS = [
    (
        "checker",
        "errors",
        "extras",
        "files",
        "given",
        "identity",
        "memory",
        "parallel",
        "progress",
        "provenance",
    ),
    ("region", "spec", "examples"),
    ("graph",),
    ("bounds",),
    ("attacks",),
    ("train", "verify"),
    ("data", "models", "recipes"),
    ("targets", "engines", "methods"),
    ("api", "rechecking"),
    ("tune",),
    ("report",),
    ("cli",),
    ("__main__",),
]
RANK = {part: rank for rank, row in enumerate(ROWS) for part in row}
SAME_ROW_ALLOWED = {
    ("extras", "errors"),
    ("files", "errors"),
    ("given", "errors"),
    ("identity", "errors"),
    ("parallel", "errors"),
    ("parallel", "extras"),
    ("parallel", "given"),
    ("parallel", "memory"),
}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tightrope."):
            yield str(node.module).split(".")[1]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in RANK, f"{part} has no place in the order of the house: add it to ROWS"
    for other in imported_parts(path):
        lower = RANK[other] < RANK[part]
        assert lower or other == part or (part, other) in SAME_ROW_ALLOWED, f"{part} imports {other}"


def test_the_checker_shares_no_code_with_what_it_checks():
    tree = ast.parse((SOURCE / "checker.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {
        "." * node.level + str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    foreign = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    assert foreign == {"numpy", "safetensors"}


def test_the_checker_is_short_enough_to_be_read():
    text = (SOURCE / "checker.py").read_text()
    docs = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            docs.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = [line.strip() for number, line in enumerate(text.splitlines(), start=1) if number not in docs]
    assert sum(bool(line) and not line.startswith("#") for line in lines) < 420
