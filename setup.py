"""Builds the optional native kernels; everything else is in pyproject.toml."""

from __future__ import annotations

from setuptools import Extension, setup

KERNELS = "gateway/engine/kernels"


def library(name: str, headers: tuple[str, ...]) -> Extension:
    """A plain shared library opened with ctypes.

    OpenMP comes from the runtime that torch has already loaded (same soname), so both share one
    team of threads. optional: without a compiler the install goes on, and torch computes.
    """
    return Extension(
        f"gateway.engine.kernels._{name}",
        sources=[f"{KERNELS}/{name}.cpp"],
        depends=[f"{KERNELS}/{header}.h" for header in headers],
        language="c++",
        extra_compile_args=["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fopenmp"],
        extra_link_args=["-fopenmp"],
        optional=True,
    )


setup(
    ext_modules=[
        library(
            "native",
            ("common", "dots", "gemm_int8", "grouped", "int8", "bf16", "float8", "kv"),
        ),
        library("step", ("common", "step", "attend", "flash")),
    ]
)
