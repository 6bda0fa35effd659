"""Rules of the whole package that no single test would notice being broken, read off the source with ast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import opsin

ROOT = Path(opsin.__file__).parent
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}

SHARED = {"constants", "errors", "machine", "memory", "output", "pixels", "ranks", "settings"}
"""Modules that import nothing of the package, or one another."""
MAY_IMPORT = {
    "backbone": SHARED,
    "data": SHARED,
    **{job: {"backbone", "data"} | SHARED for job in ("curate", "pretrain", "evaluate", "export", "report")},
    "distill": {"pretrain", "backbone", "data"} | SHARED,
    "plan": {"bench", "pretrain", "backbone", "data"} | SHARED,
    "bench": {"pretrain", "evaluate", "backbone", "data"} | SHARED,
    **dict.fromkeys(SHARED, SHARED),
}
"""What a folder or module may import beside itself; the modules below bring everything together."""
ABOVE = {
    "cli",
    "commands",
    "training_commands",
    "launch",
    "story",
    "heap_story",
    "curation_commands",
    "evaluation_commands",
    "picture_commands",
    "suite_story",
    "quickstart",
    "__init__",
}


def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(), name)


def area(name: str) -> str:
    return Path(name).parts[0].removesuffix(".py")


def imported(name: str, module: ast.Module) -> set[str]:
    """Areas of opsin that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import, which this test does not follow"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {dotted.split(".")[1] for dotted in found if dotted.startswith("opsin.")} - {"__version__"}


def test_the_reader_of_imports_sees_all_forms():
    source = """
import opsin, os
import opsin.data.crops as crops
from opsin import story
def f():
    from opsin.report.page import write_report
"""
    assert imported("x", ast.parse(source)) == {"data", "story", "report"}


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    here = area(name)
    if here in ABOVE:
        return
    assert here in MAY_IMPORT, f"say in this test what {here} may import"
    wrong = imported(name, tree(name)) - MAY_IMPORT[here] - {here}
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_only_the_command_line_imports_the_modules_above():
    for name in FILES:
        allowed = {
            "cli": {"commands", "curation_commands"},
            "commands": {
                "training_commands",
                "curation_commands",
                "evaluation_commands",
                "picture_commands",
                "launch",
                "story",
                "quickstart",
            },
            "training_commands": {"story"},
            "curation_commands": {"heap_story"},
            "evaluation_commands": {"suite_story"},
            "quickstart": {"story"},
        }.get(area(name), set())
        wrong = imported(name, tree(name)) & (ABOVE - {"__init__"}) - allowed
        assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_longer_than_can_be_read(name):
    assert len(FILES[name].read_text().splitlines()) <= 500


def test_importing_opsin_imports_nothing_heavy():
    code = (
        "import sys, opsin\n"
        "print(*(m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'PIL', 'pyarrow', 'rich', 'tyro')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_of_the_package_is_there():
    for name in opsin.__all__:
        assert getattr(opsin, name) is not None
    with pytest.raises(AttributeError, match="module 'opsin' has no attribute 'pretrian'"):
        opsin.pretrian  # noqa: B018


def prints(module: ast.Module) -> int:
    calls = [node.func for node in ast.walk(module) if isinstance(node, ast.Call)]
    return sum(isinstance(function, ast.Name) and function.id == "print" for function in calls)


def test_only_the_command_line_prints():
    counts = {
        name: prints(tree(name))
        for name in FILES
        if not area(name).endswith("commands") and area(name) not in ("cli", "quickstart")
    }
    assert not {name: count for name, count in counts.items() if count}


def public(module: ast.Module) -> list[tuple[str, ast.AST]]:
    """Public classes, functions and methods; nested functions are details of theirs."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: list[tuple[str, ast.AST]] = []
    for node in module.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            found.append((node.name, node))
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, kinds) and not part.name.startswith("_")]
                found += [(f"{node.name}.{part.name}", part) for part in methods if not is_overload(part)]
    return [(name, node) for name, node in found if not is_overload(node)]


def is_overload(node: ast.AST) -> bool:
    return any(getattr(mark, "id", None) == "overload" for mark in getattr(node, "decorator_list", []))


@pytest.mark.parametrize("name", FILES)
def test_everything_public_says_what_it_is(name):
    module = tree(name)
    if not module.body:  # an empty __init__.py
        return
    silent = [what for what, node in public(module) if not ast.get_docstring(node)]
    assert not silent
    assert ast.get_docstring(module), f"{name} does not say what it is about"


def test_mistakes_are_told_with_one_exception_class():
    """A class of exceptions that is not an OpsinError would reach a user of the command line as a traceback."""
    known = {"OpsinError"}
    for name in FILES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                assert node.name == "OpsinError" or bases & known, f"{node.name} of {name}"
