import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffdfkd.kernels.launch import (
    KernelUnavailable,
    blocks,
    check_tensor,
    launch_fault,
    power_of_two,
    settle_kernel,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_triton_on_cuda_and_the_reference_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settle_kernel("auto", CPU) == "reference"
    # Under the interpreter, too, unless it is asked for: a GPU's tensors would be carried to the CPU and back.
    assert settle_kernel("auto", CUDA) == "reference" and settle_kernel("triton", CUDA) == "triton"
    monkeypatch.setattr("diffdfkd.kernels.launch.INTERPRETED", False)
    assert settle_kernel("auto", CUDA) == "triton"
    assert settle_kernel("reference", CUDA) == "reference"
    with pytest.raises(ValueError, match="kernel: got 'fast'"):
        settle_kernel("fast", CPU)  # type: ignore[arg-type]


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffdfkd.kernels.launch.INTERPRETED", True)
    assert settle_kernel("triton", CPU) == "triton"
    monkeypatch.setattr("diffdfkd.kernels.launch.INTERPRETED", False)
    with pytest.raises(KernelUnavailable, match=r"kernel: triton needs a CUDA device.*kernel=auto"):
        settle_kernel("triton", CPU)


def test_without_the_interpreter_an_operation_says_so_before_it_launches() -> None:
    """In a process of its own, since Triton looks once."""
    program = (
        "import torch\n"
        "from diffdfkd.kernels.predict import predict\n"
        "from diffdfkd.kernels.row import start_counter\n"
        "z = torch.ones(1, 1, 2, 2)\n"
        "predict(z, z, torch.ones(1, 12), start_counter('cpu'), 1.0, kernel='triton')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("diffdfkd.kernels.launch.KernelUnavailable: kernel: triton needs")


def test_what_a_launch_needs_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    headers = tmp_path / "include"
    headers.mkdir()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(headers)})
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "C compiler" in str(launch_fault())
    monkeypatch.setenv("CC", "mycc")
    assert "headers" in str(launch_fault())
    (headers / "Python.h").touch()
    assert launch_fault() is None
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert launch_fault() is None


def test_sizes() -> None:
    assert [power_of_two(n) for n in (0, 1, 2, 3, 63, 64, 65)] == [1, 1, 2, 4, 64, 64, 128]
    assert [blocks(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_a_tensor_that_does_not_fit_is_named() -> None:
    check_tensor("none", None, (1,), torch.float32, CPU, optional=True)
    with pytest.raises(ValueError, match="needed: got None"):
        check_tensor("needed", None, (1,), torch.float32, CPU)
    good = torch.ones(3, 2)
    check_tensor("good", good, (3, 2), torch.float32, CPU)
    for words, arguments in {
        "it: got shape": ((2, 3), torch.float32, CPU),
        "it: got torch.float32": ((3, 2), torch.int64, CPU),
        "it: on cpu": ((3, 2), torch.float32, torch.device("meta")),
    }.items():
        with pytest.raises(ValueError, match=words):
            check_tensor("it", good, *arguments)
    with pytest.raises(ValueError, match="it: strides"):
        check_tensor("it", torch.ones(2, 3).T, (3, 2), torch.float32, CPU)
    with pytest.raises(ValueError, match="a float dtype expected"):
        check_tensor("it", torch.ones(3, dtype=torch.int64), (3,), None, CPU)
