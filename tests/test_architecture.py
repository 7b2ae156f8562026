"""The rules that the tree keeps: who imports whom, what never appears, what stays cheap."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "latentwire_fast"

# Imports point down only: a folder may import what stands on its own floor or below. A name stands
# for a folder of the package and everything in it, or for a file beside them.
FLOORS = [
    "_C kernels",
    "errors",
    "registry",
    "reference",
    "ops",
    "files",
    "config",
    "schedules",
    "wire",
    "cli",
    "prompts",
    "data",
    "readers",
    "models",
    "serving",
    "objectives",
    "evaluation",
    "training",
    "testbed",
    "train train_text_lora repack evaluate encode generate sweep",
    "__main__",
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
ENTRY_POINTS = sorted(" ".join(FLOORS[-2:]).split())


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def part_of(path: Path) -> str:
    """The name in FLOORS that a source file belongs to."""
    if path.parent == ROOT / "kernels":
        return "kernels"
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(tree: ast.AST) -> Iterator[str]:
    """The parts of the package that a file imports, wherever in the file it does."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *rest = name.split(".")
            assert package != "kernels", "kernels/ is imported as latentwire_fast.kernels"
            if package == "latentwire_fast" and rest and rest[0] != "__version__":
                yield rest[0]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    importer = part_of(path)
    assert importer in FLOOR_OF, f"give {importer} its floor in {Path(__file__).name}"
    for imported in imported_parts(ast.parse(path.read_text())):
        assert imported in FLOOR_OF, f"give {imported} its floor in {Path(__file__).name}"
        assert FLOOR_OF[imported] <= FLOOR_OF[importer], f"{importer} imports {imported} from above"
        if importer == "kernels":
            assert imported == "kernels", "a kernel imports nothing else of the project"


def import_graph() -> dict[str, set[str]]:
    """For each module of the package and of kernels/, the modules that it imports."""
    paths = {path: path.relative_to(ROOT).with_suffix("").parts for path in sources()}
    names = {
        path: ".".join(parts if parts[0] == PACKAGE.name else (PACKAGE.name, *parts))
        for path, parts in paths.items()
    }
    names = {path: name.removesuffix(".__init__") for path, name in names.items()}
    known = set(names.values())
    graph: dict[str, set[str]] = {name: set() for name in known}
    for path, name in names.items():
        for node in ast.walk(ast.parse(path.read_text())):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                # A name may be a module, or stand in one.
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                found = [n if n in known else str(node.module) for n in inner]
            graph[name] |= {n for n in found if n in known and n not in (name, PACKAGE.name)}
    return graph


def test_no_module_imports_itself_through_others() -> None:
    """The order of a topological sort exists."""
    tuple(graphlib.TopologicalSorter(import_graph()).static_order())


def test_rooms_have_few_arrows() -> None:
    """A room is a folder of the package with all that it holds, or a file directly in the package.
    An arrow goes from a room to another one that it imports, however often. The flat layout before
    had 238. (With folders inside folders as rooms of their own there are about 160.)"""
    rooms = {name: room_of(name) for name in import_graph()}
    arrows = {
        (rooms[name], rooms[imported])
        for name, found in import_graph().items()
        for imported in found
        if rooms[name] != rooms[imported]
    }
    assert len(arrows) <= 130, sorted(arrows)


def room_of(module: str) -> str:
    """The folder of the package that holds a module; a module directly in the package itself."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_S1_no_code_execution_from_data(path: Path) -> None:
    """No torch.load, pickle, eval, exec or trust_remote_code=True anywhere in the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            is_torch_load = node.attr == "load" and ast.unparse(node.value) == "torch"
            assert not is_torch_load, f"{where}: torch.load"
        elif isinstance(node, ast.Name):
            assert node.id not in {"eval", "exec", "compile", "__import__"}, f"{where}: {node.id}"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names]
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
            found = unsafe & {module.split(".")[0] for module in modules}
            assert not found, f"{where}: {found}"
        elif isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle"}:
            assert ast.unparse(node.value) == "False", f"{where}: {node.arg}"
        elif isinstance(node, ast.keyword) and node.arg == "weights_only":
            pytest.fail(f"{where}: weights_only belongs to torch.load; use safetensors")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter at the repository root, as an uninstalled checkout would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_importing_the_package_imports_no_torch() -> None:
    done = run_python(
        "import sys, latentwire_fast, latentwire_fast.errors\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'numpy'}))"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_help_loads_nothing_heavy(name: str) -> None:
    """`--help` answers in under half a second. Time is noisy, so what costs it is checked: torch
    alone takes a second to import."""
    done = run_python(
        "import runpy, sys\n"
        f"sys.argv = ['{name}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('latentwire_fast.{name}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'scipy', 'tensorboard'}\n"
        "loaded = heavy & {module.split('.')[0] for module in sys.modules}\n"
        "print('LOADED', sorted(loaded), file=sys.stderr)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    assert "LOADED []" in done.stderr, done.stderr


def test_kernels_folder_does_not_shadow_the_hub_package() -> None:
    """transformers imports the Hugging Face package `kernels`; ours must not stand in its place."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    done = run_python("import transformers.integrations.hub_kernels")
    assert done.returncode == 0, done.stderr


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_direct_dependency_is_pinned_once_and_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {
        normalised(re.split(r"[<>=!~ \[;]", requirement)[0])
        for requirement in [*project["dependencies"], *(r for rs in extras.values() for r in rs)]
    }
    pins = [
        line.partition("#")[::2]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    pinned = [normalised(pin.split("==")[0]) for pin, _ in pins]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+ *", pin) for pin, _ in pins)
    assert all(reason.strip() for _, reason in pins)
    assert len(pinned) == len(set(pinned))
    # torch and triton are pinned in the Makefile: which they are is the choice of who installs.
    assert wanted - {"torch", "triton"} == set(pinned)
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^TORCH \?= torch==[\d.]+$", makefile, re.MULTILINE)
    assert re.search(r"^TRITON \?= triton==[\d.]+$", makefile, re.MULTILINE)
