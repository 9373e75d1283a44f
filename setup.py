"""Compiles the hot path: every module that has a .pxd beside it is typed Python for Cython. And
libkbus-preload.so, which is for other programs: without Python, and without a libc of its own."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

COMPILED = sorted(
    str(Path(pxd).with_suffix(".py"))
    for pxd in glob("kbusd/**/*.pxd", recursive=True)
    if Path(pxd).with_suffix(".py").exists()
)

# What only the supervisor loads; its modules and those of workers may have the same last names.
APART = ("kbusd/supervisor/", "kbusd/cuse/")
FLAGS = {
    "include_dirs": ["kbusd/rings"],
    "extra_compile_args": ["-O2", "-std=c11", "-Wall", "-Wno-unused-function"],
    "extra_link_args": ["-Wl,-z,now", "-Wl,-z,noseparate-code"],
}

modules = cythonize(
    [Extension(path.removesuffix(".py").replace("/", "."), [path], **FLAGS) for path in COMPILED],
    build_dir="build",
    compiler_directives={
        "language_level": 3,
        "boundscheck": True,
        "wraparound": False,
        "embedsignature": False,
    },
)
apart = [each for each in modules if each.name.replace(".", "/").startswith(APART)]
# All others are one shared object, which kbusd/__init__.py finds them in: each file that is mapped costs
# the fork of every worker, and its end.
native = Extension(
    "kbusd.native",
    [source for each in modules if each not in apart for source in each.sources],
    depends=[name for each in modules for name in each.depends],
    **FLAGS,
)

PRELOAD = "kbusd/preload/preload.c"
PRELOAD_FLAGS = (
    "-shared -fPIC -O2 -std=gnu11 -Wall -Wextra -fvisibility=hidden -nostdlib -fno-stack-protector "
    "-U_FORTIFY_SOURCE -Wl,-soname,libkbus-preload.so -Wl,-z,relro,-z,now"
)


class Build(build_ext):
    def build_extensions(self):
        compile_all = self.compiler.compile

        def compile_changed(sources, output_dir=None, depends=(), **options):
            """Only what has changed, and as many at once as there are processors."""

            def compile_one(source):
                (made,) = self.compiler.object_filenames([source], output_dir=output_dir)
                if self.force or newer_group([source, *depends], made):
                    compile_all([source], output_dir=output_dir, depends=depends, **options)
                return made

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(compile_one, sources))

        self.compiler.compile = compile_changed
        super().build_extensions()

    def run(self):
        super().run()
        library = Path("" if self.inplace else self.build_lib, "kbusd/preload/libkbus-preload.so")
        if library.exists() and library.stat().st_mtime > Path(PRELOAD).stat().st_mtime:
            return
        library.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, *PRELOAD_FLAGS.split(), "-o", library, PRELOAD], check=True)


setup(cmdclass={"build_ext": Build}, ext_modules=[native, *apart])
