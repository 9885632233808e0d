"""Kernels in C++, compiled once a machine and kept in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

from posttrain.models import cache_dir


def compiled(source: Path, *, otherwise: str) -> ctypes.CDLL | None:
    """The library made from one C++ file, which may use PyTorch's headers and OpenMP.

    None where there is no compiler, and with a warning, which says what is done ``otherwise``, where it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    torch_home = Path(torch.__file__).parent
    compile_flags = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", f"-I{torch_home / 'include'}")
    # Linked without OpenMP: its calls find PyTorch's own copy, and with it the threads that PyTorch has.
    libraries = (f"-L{torch_home / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10")
    link_flags = (*libraries, f"-Wl,-rpath,{torch_home / 'lib'}")
    made_of = f"{compiler}{compile_flags}{link_flags}{torch.__version__}{_processor()}{source.read_text()}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    path = cache_dir() / "kernels" / f"{source.stem}-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built, linked = f"{folder}/built.o", Path(folder, "linked.so")
            for step in (
                (*compile_flags, "-c", str(source), "-o", built),
                ("-shared", built, *link_flags, "-o", str(linked)),
            ):
                done = subprocess.run([compiler, *step], capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    warnings.warn(f"{source.name} did not compile; {otherwise}: {done.stderr}", stacklevel=2)
                    return None
            linked.replace(path)
    return ctypes.CDLL(str(path))


def _processor() -> str:
    """What ``-march=native`` depends on."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return line
    return ""
