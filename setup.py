"""Compiles the hot path: every module that has a .pxd beside it is typed Python for Cython. And
libkbus-preload.so, which is for other programs: without Python, and without a libc of its own."""

import os
import subprocess
from glob import glob
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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
        extra_link_args=["-Wl,-z,now", "-Wl,-z,noseparate-code"],
    )
    for path in COMPILED
]

PRELOAD = "kbusd/preload/preload.c"
PRELOAD_FLAGS = (
    "-shared -fPIC -O2 -std=gnu11 -Wall -Wextra -fvisibility=hidden -nostdlib -fno-stack-protector "
    "-U_FORTIFY_SOURCE -Wl,-soname,libkbus-preload.so -Wl,-z,relro,-z,now"
)


class Build(build_ext):
    def run(self):
        super().run()
        library = Path("" if self.inplace else self.build_lib, "kbusd/preload/libkbus-preload.so")
        if library.exists() and library.stat().st_mtime > Path(PRELOAD).stat().st_mtime:
            return
        library.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, *PRELOAD_FLAGS.split(), "-o", library, PRELOAD], check=True)


setup(
    cmdclass={"build_ext": Build},
    ext_modules=cythonize(
        extensions,
        build_dir="build",
        compiler_directives={
            "language_level": 3,
            "boundscheck": True,
            "wraparound": False,
            "embedsignature": False,
        },
    ),
)
