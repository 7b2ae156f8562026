"""Builds `latentwire_fast._C` from csrc/ with CMake. Everything else is in pyproject.toml.

    pip install --no-build-isolation -e .                              # with the extension
    LATENTWIRE_NO_EXTENSION=1 pip install --no-build-isolation -e .    # without it

Without torch, CMake or a compiler the package is installed without the extension, with a warning:
`latentwire_fast.readers.kv_placement` then runs its torch path, which gives the same results.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_folder() -> Path:
    """The folder of torch: the extension is compiled against the torch that will load it."""
    try:
        import torch.utils
    except ImportError as error:
        raise RuntimeError(
            "torch is not importable here; install it first and pass --no-build-isolation"
        ) from error
    return Path(torch.utils.cmake_prefix_path).parents[1]


class CMakeBuild(build_ext):
    """Runs CMake and Ninja for the one extension; any failure leaves the extension out."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.run_cmake(target.parent)
        except (RuntimeError, ImportError, OSError, subprocess.CalledProcessError) as error:
            # `optional` lets the build go on without the file that this did not make.
            self.warn(f"latentwire_fast is installed without its C++ extension: {error}")

    def run_cmake(self, output: Path) -> None:
        import pybind11

        # cmake and ninja come from the environment that runs this file, then from the system.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            raise RuntimeError("cmake was not found; `pip install cmake ninja`")
        # Kept between builds (a rebuild compiles only what changed), one per Python version.
        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_FOLDER={torch_folder()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        ]
        environment = {**os.environ, "PATH": path}
        for command in (configure, [cmake, "--build", str(build), "--target", "_C"]):
            subprocess.run(command, check=True, env=environment)


# Readers' weights, cards and chat templates; the report's templates.
DATA = ("safetensors", "json", "jinja", "md", "j2")
skip = os.environ.get("LATENTWIRE_NO_EXTENSION", "0") not in ("", "0")
setup(
    packages=[*find_packages(include=["latentwire_fast*"]), "latentwire_fast.kernels"],
    package_dir={"latentwire_fast.kernels": "kernels"},
    include_package_data=False,  # exactly what package_data names
    package_data={
        "latentwire_fast": ["py.typed", "*.pyi", *(f"**/*.{kind}" for kind in DATA)],
        "latentwire_fast.kernels": ["*.md"],
    },
    ext_modules=[] if skip else [Extension("latentwire_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
