"""The packages of the wheel: those in src, and the kernels' sources as finchtune.cuda."""

from pathlib import Path

from setuptools import find_packages, setup

SOURCES = ["cuda", *(f"cuda/{path.name}" for path in Path("cuda").iterdir() if path.is_dir())]

setup(
    packages=[
        *find_packages("src"),
        *(f"finchtune.{folder.replace('/', '.')}" for folder in SOURCES),
    ],
    package_dir={"": "src", "finchtune.cuda": "cuda"},
    package_data={"": ["*.cpp", "*.h", "*.cu", "*.cuh", "*.css", "*.js", "py.typed"]},
)
