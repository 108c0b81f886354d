"""The native parts of the build; everything else about the package is in pyproject.toml.

`afd/ops/cpu/_native.so` is a plain shared library, loaded with ctypes: no Python symbols in it. Each instruction set
has source files with its own flags; which of them runs is decided at run time. `stepmesh/_native.so` is an extension
module of Python's limited API. Without a working compiler the package installs without them, and says so.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE_DIR = Path("afd/ops/cpu/src")
RELAY_DIR = Path("afd/relay/src")  # a second interface of the same library: layers and the exchanges between them
MESH_HEADERS = sorted(Path("stepmesh").glob("*.h"))
# Those that take long to compile come first: they are compiled side by side.
SOURCES = [
    "isa_portable.cpp",
    "abi.cpp",
    "api.cpp",
    "attention_plan.cpp",
    "layer.cpp",
    "run.cpp",
    "thread_pool.cpp",
]
SOURCES += ["sample.cpp", "sample_cut.cpp", "sample_portable.cpp"]
RELAY_SOURCES = ["relay.cpp", "relay_abi.cpp"]
X86_SOURCES = ["isa_avx512.cpp", "isa_avx2.cpp", "sample_avx2.cpp", "sample_avx512.cpp"]
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-g0"]
AVX2_FLAGS = ["-mavx2", "-mfma"]
# The last two: GCC's AVX-512 headers trip its own warnings.
AVX512_FLAGS = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512bf16",
    "-mavx512vnni",
    "-mfma",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
SAME_BITS_FLAGS = ["-ffp-contract=off", "-fno-math-errno"]  # for results that must not depend on the instruction set
FILE_FLAGS = {
    "isa_avx2.cpp": AVX2_FLAGS,
    "isa_avx512.cpp": AVX512_FLAGS,
    "sample.cpp": SAME_BITS_FLAGS,
    "sample_cut.cpp": SAME_BITS_FLAGS,
    "sample_portable.cpp": SAME_BITS_FLAGS,
    "sample_avx2.cpp": SAME_BITS_FLAGS + AVX2_FLAGS,
    "sample_avx512.cpp": SAME_BITS_FLAGS + AVX512_FLAGS,
}
IS_X86 = platform.machine() in ("x86_64", "AMD64")


class BuildKernels(build_ext):
    """build_ext with flags per source file, on all cores, and a file name without Python's ABI tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        plain_compile, plain_link = self.compiler._compile, self.compiler.link_shared_object
        objects: list[Future[None]] = []

        def compile_with_flags(obj, src, suffix, cc_args, extra_args, pp_opts):  # type: ignore[no-untyped-def]
            flags = extra_args + FILE_FLAGS.get(Path(src).name, [])
            objects.append(pool.submit(plain_compile, obj, src, suffix, cc_args, flags, pp_opts))

        def link_what_is_compiled(*args, **kwargs):  # type: ignore[no-untyped-def]
            for compiled in objects:
                compiled.result()
            plain_link(*args, **kwargs)

        self.compiler._compile, self.compiler.link_shared_object = compile_with_flags, link_what_is_compiled
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                super().build_extension(ext)
        finally:
            self.compiler._compile, self.compiler.link_shared_object = plain_compile, plain_link


setup(
    ext_modules=[
        Extension(
            "afd.ops.cpu._native",
            sources=[
                *(str(SOURCE_DIR / name) for name in (X86_SOURCES if IS_X86 else []) + SOURCES),
                *(str(RELAY_DIR / name) for name in RELAY_SOURCES),
            ],
            include_dirs=["stepmesh", str(SOURCE_DIR)],
            depends=[str(path) for path in sorted([*SOURCE_DIR.glob("*.h"), *RELAY_DIR.glob("*.h"), *MESH_HEADERS])],
            define_macros=[("AFD_HAVE_X86", "1")] if IS_X86 else [],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        ),
        Extension(
            "stepmesh._native",
            sources=["stepmesh/_native.c"],
            depends=[str(path) for path in MESH_HEADERS],
            extra_compile_args=["-std=c11", "-D_GNU_SOURCE", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra", "-g0"],
            py_limited_api=True,
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildKernels},
)
