"""Compiles the hot path: every module that has a .pxd beside it is typed Python for Cython."""

from glob import glob
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

COMPILED = sorted(
    str(Path(pxd).with_suffix(".py"))
    for pxd in glob("kbusd/**/*.pxd", recursive=True)
    if Path(pxd).with_suffix(".py").exists()
)

extensions = [
    Extension(
        path.removesuffix(".py").replace("/", "."),
        [path],
        include_dirs=["kbusd/rings"],
        extra_compile_args=["-O2", "-std=c11", "-Wall", "-Wno-unused-function"],
    )
    for path in COMPILED
]

setup(
    ext_modules=cythonize(
        extensions,
        build_dir="build",
        compiler_directives={
            "language_level": 3,
            "boundscheck": True,
            "wraparound": False,
            "embedsignature": False,
        },
    )
)
