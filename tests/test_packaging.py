"""The package works uninstalled, editable and as a wheel, with the folder `kernels/` inside it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROBE = (
    "import importlib, sys, latentwire_fast\n"
    "from latentwire_fast import errors\n"
    "kernels = importlib.import_module('latentwire_fast.kernels')\n"
    "assert 'kernels' not in sys.modules\n"
    "print(latentwire_fast.__file__, next(iter(kernels.__path__)))\n"
)
# A preset, a shipped reader with its chat template, and a prompt.
READ = (
    "import latentwire_fast as lw\n"
    "config = lw.load_preset('testbed_quick')\n"
    "reader = lw.load_readers(config.readers, 'cpu')['llama']\n"
    "assert reader.tokenizer.chat_template\n"
    "assert reader.prompts.build([lw.Turn('Who?')], context='x').ids\n"
)


def run(*command: str, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_uninstalled_from_the_root(repository: Path) -> None:
    """`-S` leaves site-packages out, so that the checkout alone answers."""
    package, kernels = run(sys.executable, "-S", "-c", PROBE, cwd=repository).split()
    assert Path(package) == repository / "latentwire_fast" / "__init__.py"
    assert Path(kernels) == repository / "kernels"


def test_installed_from_elsewhere(repository: Path, tmp_path: Path) -> None:
    """The installation that runs these tests, editable or not, works outside the checkout."""
    if "latentwire-fast" not in run(sys.executable, "-m", "pip", "list", cwd=tmp_path):
        pytest.skip("latentwire-fast is not installed in this environment")
    package, kernels = run(sys.executable, "-c", PROBE, cwd=tmp_path).split()
    assert Path(package).parent.name == "latentwire_fast"
    assert Path(kernels) in (repository / "kernels", Path(package).parent / "kernels")


@pytest.fixture
def source(repository: Path, tmp_path: Path) -> Path:
    """A copy of what a build reads."""
    copy = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("latentwire_fast", "kernels", "csrc"):
        shutil.copytree(repository / folder, copy / folder, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(repository / name, copy / name)
    return copy


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LATENTWIRE_NO_EXTENSION": "1"}, None),
        ({"CXX": "/bin/false"}, "installed without its C++ extension"),
    ],
)
def test_a_build_without_the_extension(
    source: Path, environment: dict[str, str], message: str | None
) -> None:
    """Asked for, or because there is no compiler that works: the build goes on, and says so."""
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    said = run(*command, cwd=source, **environment)
    assert not list(source.rglob("*.so"))
    assert (message is None and "C++" not in said) or (message is not None and message in said)


@pytest.mark.slow
def test_wheel(repository: Path, source: Path, tmp_path: Path) -> None:
    """A wheel built from the sources holds every file of the package and the kernels, and works
    where there is no checkout."""
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), ".", cwd=source)
    (wheel,) = wheels.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=tmp_path)

    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(repository))
        for path in (repository / "latentwire_fast").rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    wanted |= {
        f"latentwire_fast/{p.relative_to(repository)}" for p in (repository / "kernels").glob("*.*")
    }
    extension = {name for name in packed if name.endswith(".so")}
    assert packed - extension == wanted
    assert len(extension) == 1

    package, kernels = run(sys.executable, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert Path(package) == site / "latentwire_fast" / "__init__.py"
    assert Path(kernels) == site / "latentwire_fast" / "kernels"
    run(
        *(
            sys.executable,
            "-c",
            "from latentwire_fast.readers import kv_placement as p; assert p.has_extension()",
        ),
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
    script = site / "bin" / "latentwire"
    said = run(sys.executable, str(script), "--version", cwd=tmp_path, PYTHONPATH=str(site))
    assert said.startswith("latentwire ")
    run(sys.executable, "-c", READ, cwd=tmp_path, PYTHONPATH=str(site))


def test_the_image_holds_what_the_package_asks_for(repository: Path) -> None:
    """The Dockerfile cannot be built here: its versions, extras and files are held against the
    tree."""
    text = (repository / "Dockerfile").read_text()
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = map(Requirement, [*project["dependencies"], *extras["gpu"]])
    allowed = {requirement.name: requirement.specifier for requirement in wanted}
    pinned = dict(re.findall(r" (torch|triton)==([\d.]+)", text))
    assert set(pinned) == {"torch", "triton"}
    for name, version in pinned.items():
        assert version in allowed[name], name
    (installed,) = re.findall(r'-e "\.\[([\w,]+)\]"', text)
    assert set(installed.split(",")) <= set(extras)
    # The constraints hold together with that torch, which wants an older setuptools.
    constraints = (repository / "constraints.txt").read_text()
    assert int(re.findall(r"^setuptools==(\d+)", constraints, re.MULTILINE)[0]) < 82
