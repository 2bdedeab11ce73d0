"""Imports run one way: kernels <- engine <- converter; the command line reaches the converter when it converts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS, ENGINE, CONVERTER = "kernels/gguf_sd_kernels", "gguf_sd", "convert/gguf_sd_convert"
# What a package must not import from the others, at import time and inside functions.
FORBIDDEN = {
    KERNELS: ({"gguf_sd", "gguf_sd_convert"}, {"gguf_sd", "gguf_sd_convert"}),
    ENGINE: ({"gguf_sd_convert"}, {"gguf_sd_convert"}),
    CONVERTER: (set(), set()),
}
# The command line and the package's front convert too, and import what does that when they are asked to.
CONVERTS_ON_DEMAND = ("gguf_sd/cli/", "gguf_sd/api.py")
NEVER_AT_IMPORT = {"triton"}


def imports(tree: ast.AST, late: bool = False) -> Iterator[tuple[str, bool]]:
    """Names of the packages that a file imports, and whether that happens inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name.split(".")[0], late) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], late
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, late or inside)


def offences(package: str, path: str, source: str) -> list[str]:
    """The imports of a file that the order of the packages forbids."""
    at_import, in_functions = FORBIDDEN[package]
    if path.startswith(CONVERTS_ON_DEMAND):
        in_functions = set()
    if not path.startswith(f"{KERNELS}/triton/"):
        at_import = at_import | NEVER_AT_IMPORT
    found = imports(ast.parse(source))
    return [f"{path} imports {name}" for name, late in found if name in (in_functions if late else at_import)]


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_imports_run_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 10
    found = [line for file in files for line in offences(package, str(file.relative_to(ROOT)), file.read_text())]
    assert not found


@pytest.mark.parametrize(
    ("package", "path", "source", "allowed"),
    [
        (KERNELS, f"{KERNELS}/ops.py", "def f():\n    from gguf_sd.config import SD15", False),
        (KERNELS, f"{KERNELS}/ops.py", "import gguf_sd_kernels.formats", True),
        (KERNELS, f"{KERNELS}/ops.py", "import triton", False),
        (KERNELS, f"{KERNELS}/triton/linear.py", "import triton", True),
        (ENGINE, "gguf_sd/pipeline.py", "try:\n    import gguf_sd_convert.writer\nexcept ImportError: pass", False),
        (ENGINE, "gguf_sd/pipeline.py", "def f():\n    import gguf_sd_convert", False),
        (ENGINE, "gguf_sd/cli/convert.py", "def f():\n    import gguf_sd_convert", True),
        (ENGINE, "gguf_sd/cli/convert.py", "from gguf_sd_convert import convert", False),
        (CONVERTER, f"{CONVERTER}/convert.py", "from gguf_sd.config import SD15", True),
    ],
)
def test_the_rule_itself(package: str, path: str, source: str, allowed: bool) -> None:
    assert (not offences(package, path, source)) == allowed
