"""The packages of the wheel: those in src, and the kernels' sources as finchtune.cuda."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

SOURCES = ["cuda", *(f"cuda/{path.name}" for path in Path("cuda").iterdir() if path.is_dir())]


class FreshBuild(build_py):
    """Copies the modules into an empty folder: what an earlier build left there may be gone."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    cmdclass={"build_py": FreshBuild},
    packages=[
        *find_packages("src"),
        *(f"finchtune.{folder.replace('/', '.')}" for folder in SOURCES),
    ],
    package_dir={"": "src", "finchtune.cuda": "cuda"},
    package_data={"": ["*.cpp", "*.h", "*.cu", "*.cuh", "*.css", "*.js", "py.typed"]},
)
