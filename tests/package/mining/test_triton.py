"""Backend "triton" of `mine_pairs` without a GPU: in Triton's interpreter, and compiled ahead of time for each GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

triton = pytest.importorskip("triton")

from apinet_head.mining import triton as backend  # noqa: E402
from apinet_head.mining import triton_tiles  # noqa: E402
from apinet_head.mining.triton_tiles import TILES  # noqa: E402

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB that a block may have


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.2"), reason="the interpreter of older Tritons lacks what the kernels use"
)
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(chosen):
    tests = Path(__file__).with_name("test_mining.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["-k", "triton and not errors", "-m", chosen, tests]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def compile_kernels(monkeypatch, capability: int) -> dict[str, list]:
    """From here on, launches on a CPU compile for a GPU that isn't there, and no more; by name, what they compiled."""
    kernels: dict[str, list] = {}
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernels.setdefault(self.fn.__name__, []).append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    if not hasattr(triton.runtime.driver, "_active"):
        pytest.skip("this release of Triton takes no other driver")
    driver = SimpleNamespace(
        get_current_device=lambda: capability,  # Triton keeps what it compiled by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", capability, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(backend, "_capability", lambda device: capability)
    return kernels


def memory_of_threads(kernel, tmp_path) -> tuple[int, int]:
    """Bytes of stack and other local memory: where registers go that don't fit."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("STACK", "LOCAL"))


@pytest.mark.skipif(not hasattr(triton, "knobs"), reason="this way of compiling is that of newer Tritons")
@pytest.mark.parametrize("intra", [1, -1])
@pytest.mark.parametrize("capability", [80, 86, pytest.param(89, marks=pytest.mark.slow), 90])
def test_compiles_without_spills(capability, intra, monkeypatch, tmp_path):
    assert set(TILES) == {0, *SHARED_MEMORY}
    kernels = compile_kernels(monkeypatch, capability)
    features, labels = torch.zeros(200, 2048, dtype=torch.bfloat16), torch.zeros(200, dtype=torch.long)
    for few, direct in ((1 << 60, 0), (0, 0), (0, backend.DIRECT)):
        monkeypatch.setattr(triton_tiles, "FEW", few)
        monkeypatch.setattr(backend, "DIRECT", direct)
        backend.find_partners(features, labels, None, labels, 0, intra, -intra)
        backend.find_partners(features, labels, features.float(), labels, None, intra, -intra)
    assert set(kernels) == {"look", "find_centre", "lay_out", "search", "choose", "search_directly"}
    for kernel in [kernel for runs in kernels.values() for kernel in runs]:
        assert memory_of_threads(kernel, tmp_path) == (0, 0)
        assert kernel.metadata.shared <= SHARED_MEMORY[capability] * 1024
