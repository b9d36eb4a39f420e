"""What is installed, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import graphprune

ROOT = Path(__file__).resolve().parent.parent

# Import names of the distributions that pyproject.toml lists under `dependencies`; google.protobuf and ml_dtypes are
# what onnx itself returns objects of.
CORE = {"onnx", "onnx_ir", "onnxruntime", "numpy", "scipy", "networkx", "rich", "google", "ml_dtypes"}


def python_files(*folders: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def run(code: str) -> str:
    """The standard output of a fresh interpreter that runs `code` in the checkout."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_once(wheel: zipfile.ZipFile) -> None:
    modules = [name for name in wheel.namelist() if name.endswith(".py")]
    top = [
        path
        for path in python_files("graphprune")
        if not path.startswith(("graphprune/passes/", "graphprune/kernels/"))
    ]
    linked = [f"graphprune/{path}" for path in python_files("passes", "kernels")]
    assert sorted(modules) == sorted({*top, *linked})
    assert "graphprune/py.typed" in wheel.namelist()
    # A symbolic link in the archive would have a link's mode: it must be the file itself.
    assert all(info.file_size > 0 for info in wheel.infolist() if info.filename in linked)


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    folder = f"graphprune-{graphprune.__version__}.dist-info"
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert f"\nVersion: {graphprune.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert b"graphprune = graphprune.cli:main" in wheel.read(f"{folder}/entry_points.txt")
    assert b"Apache License" in wheel.read(f"{folder}/licenses/LICENSE")


def test_sdist_holds_what_the_wheel_needs(tmp_path: Path, wheel: zipfile.ZipFile) -> None:
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(path) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive.getmembers()}
        needed = [name for name in wheel.namelist() if name.startswith("graphprune/")]
        assert set(needed) <= members.keys()
        assert all(members[name].isreg() for name in needed)
        assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= members.keys()
        archive.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    (again,) = WheelBuilder(str(folder)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(again) as rebuilt:
        assert sorted(rebuilt.namelist()) == sorted(wheel.namelist())


def test_import_is_light() -> None:
    heavy = "{'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'scipy', 'networkx', 'rich', 'sympy', 'google'}"
    assert run(f"import sys, graphprune; print(sorted({heavy} & sys.modules.keys()))").strip() == "[]"


def test_import_takes_under_50_ms() -> None:
    # Of the processor, and the least of some runs: what the import needs, not what else the machine was doing.
    code = "import time; t = time.process_time(); import graphprune; print(time.process_time() - t)"
    assert min(float(run(code)) for _ in range(5)) < 0.050


def test_every_public_name_resolves() -> None:
    for name in graphprune.__all__:
        assert getattr(graphprune, name) is not None
        assert name in dir(graphprune)
    assert issubclass(graphprune.VerificationError, graphprune.GraphPruneError)
    assert callable(graphprune.prune)
    assert callable(graphprune.analyze)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        graphprune.__getattr__("prunes")


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "graphprune/__init__.py").read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        alias.asname: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == graphprune._HOMES


def test_top_folders_shadow_nobody(tmp_path: Path) -> None:
    """Somebody's installed package `kernels` wins over our folder, though the checkout comes first on the path."""
    for name in ("kernels", "passes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'somebody else'\n")
        code = f"import sys; sys.path.append({str(tmp_path)!r}); import {name}; print({name}.OWNER)"
        assert run(code).strip() == "somebody else"


def imports(path: str, *, module_level: bool) -> Iterator[str]:
    """Top names that a file imports; at module level only those that run when it is imported."""
    pending: list[ast.AST] = [ast.parse((ROOT / path).read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or typing_only
        if not (module_level and inner):
            pending.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", python_files("graphprune"))
def test_imports_only_what_is_declared(path: str) -> None:
    """An extra may be imported where it is used, never when the module is."""
    foreign = set(imports(path, module_level=True)) - sys.stdlib_module_names - {"graphprune"}
    assert foreign <= CORE


def test_kernels_know_no_onnx() -> None:
    used = {path: set(imports(path, module_level=False)) for path in python_files("kernels")}
    assert not [path for path, names in used.items() if names & {"onnx", "onnx_ir", "onnxruntime"}]
