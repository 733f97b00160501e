"""Builds the C++ kernels when `csrc/` holds sources; everything else is declared in pyproject.toml.

The kernels are a core without torch: a plain shared library whose functions take pointers and sizes. So the build needs a C++17
compiler and nothing else, and one binary serves every torch that is supported.
"""

from pathlib import Path

from setuptools import Extension, setup

sources = sorted(path.as_posix() for path in Path("csrc").glob("*.cpp"))

setup(
    ext_modules=[
        Extension(
            "whispers_kernels._C",
            sources,
            depends=sorted(path.as_posix() for path in Path("csrc").glob("*.h")),
            language="c++",
            # Instruction sets are chosen at run time: a wheel must run on machines other than the one that built it.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-Wno-uninitialized",  # gcc 12 warns of its own AVX-512 intrinsics
                "-Wno-maybe-uninitialized",
                # A product that is added to something is rounded where the source says so, in every variant of a loop alike.
                "-ffp-contract=off",
                "-pthread",
            ],
            extra_link_args=["-pthread"],
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            py_limited_api=True,
        )
    ]
    if sources
    else [],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if sources else {},
)
