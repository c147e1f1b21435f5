"""Rules about who may do what, beyond the layers that import-linter holds."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from sutazai.cli.startup import SHARED_MODULES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sutazai"
MODULES = sorted(PACKAGE.rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))


def test_what_is_loaded_before_the_fork_is_there() -> None:
    missing = [name for name in SHARED_MODULES if importlib.util.find_spec(name) is None]
    assert not missing, "each process would load it for itself"


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk a module without what only type checkers read."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _runtime_nodes(child)


def _imports(path: Path) -> set[str]:
    names = set()
    for node in _runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_sqlalchemy_is_imported_only_where_tables_and_statements_are() -> None:
    allowed = {"models.py", "db.py", "statements.py", "migration.py", "tables.py"}
    users = {path for path in MODULES if "sqlalchemy" in _imports(path)}
    assert not [_name(path) for path in users if path.name not in allowed]


def test_only_db_commits() -> None:
    committing = {
        _name(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "commit"
    }
    # db.py commits by leaving `begin()`; migration.py ends the transaction of its advisory lock.
    assert committing == {"sutazai/migration.py"}


def test_only_settings_reads_the_environment() -> None:
    allowed = {
        "sutazai/settings.py",
        # Hands an environment over to a forked process.
        "sutazai/embedded/child.py",
    }
    readers = {
        _name(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
    }
    assert readers <= allowed


@pytest.mark.parametrize("path", [*MODULES, *BENCHMARKS], ids=_name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{_name(path)} has no docstring"


@pytest.mark.parametrize("path", [*MODULES, *BENCHMARKS], ids=_name)
def test_modules_stay_short_enough_to_be_read(path: Path) -> None:
    if path.name != "statements.py":  # all SQL in one place is worth one long file
        assert len(path.read_text().splitlines()) <= 520


def test_importing_the_package_does_nothing() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert len(tree.body) == 1  # its docstring
