"""What pyproject.toml cannot say without a warning: the C library, which the install goes on without where nothing compiles it."""

from setuptools import Extension, setup

FOLDER = "kernels/rerank_kernels"
setup(
    ext_modules=[
        Extension("rerank_kernels._native", [f"{FOLDER}/_native.c"], depends=[f"{FOLDER}/_native_simd.h"], extra_compile_args=["-O3", "-g0"], optional=True)
    ]
)
