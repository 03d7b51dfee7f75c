"""Builds the optional native kernels; everything else is in pyproject.toml."""

from __future__ import annotations

from setuptools import Extension, setup

KERNELS = "gateway/engine/kernels"

setup(
    ext_modules=[
        # A plain shared library opened with ctypes. OpenMP comes from the runtime that torch has
        # already loaded (same soname), so both share one team of threads. optional: without a
        # compiler the install goes on, and layers compute through torch.
        Extension(
            "gateway.engine.kernels._native",
            sources=[f"{KERNELS}/native.cpp"],
            depends=[
                f"{KERNELS}/{name}.h"
                for name in ("common", "gemm_int8", "grouped", "int8", "bf16", "float8", "kv")
            ],
            language="c++",
            extra_compile_args=["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
