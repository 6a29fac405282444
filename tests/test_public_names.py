"""Other libraries are met through their public names, but for some of torch in files that say why."""

import ast
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import lightning_danns

ROOT = Path(lightning_danns.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
TORCH = {
    "layers/dale.py": {"_foreach_clamp_min_", "_C", "_are_functorch_transforms_active", "_modules"},
    "layers/fused.py": {"_C", "_are_functorch_transforms_active", "_current_level"},
    "analysis/nonnegativity.py": {"_python_dispatch", "_pytree", "_schema"},
}
"""Private names of torch, where speed or proof needs them."""


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def own_names():
    """Every name that the package defines or sets itself."""
    names = set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def foreign_private_names(tree, own):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if is_private(node.attr) and node.attr not in own:
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_danns"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (part for part in parts if is_private(part))


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_uses_no_private_name_of_another_library(path):
    found = set(foreign_private_names(TREES[path], own_names()))
    assert found <= TORCH.get(str(path.relative_to(ROOT)), set())


@pytest.mark.parametrize("room", ["layers", "optim", "analysis", "callbacks", "modules", "data", "replicas"])
def test_no_file_of_a_room_hides_a_function_of_its_name(room):
    module = import_module(f"lightning_danns.{room}")
    assert [name for name in module.__all__ if isinstance(getattr(module, name), ModuleType)] == []


def test_the_search_finds_what_it_is_for():
    code = "from torch._C import x\nimport os\nos._exit(1)\nself._own = 1\nself._own\n"
    assert sorted(foreign_private_names(ast.parse(code), {"_own"})) == ["_C", "_exit"]
