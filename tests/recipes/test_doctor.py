"""``diffdfkd doctor``: what it finds, what it says is missing, and that no probe can harm the process."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from diffdfkd.engine.errors import UserError
from diffdfkd.recipes import doctor, extras, machine

ROOT = Path(doctor.__file__).resolve().parent.parent


@pytest.fixture
def few_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extras whose probes cost nothing."""
    monkeypatch.setattr(extras, "EXTRAS", {name: extras.EXTRAS[name] for name in ("test", "tensorrt")})


def test_the_extras_are_those_of_setup_py() -> None:
    listed = re.search(r"extras_require=\{(.*?)\n    \}", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert listed is not None
    assert set(re.findall(r'^        "([\w-]+)": ', listed.group(1), re.MULTILINE)) == set(extras.EXTRAS)


def test_the_text_is_narrow_and_the_json_says_the_same(few_extras: None, tmp_path: Path) -> None:
    text = doctor.doctor(json_file=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(len(line) <= doctor.WIDTH or "-m pip install" in line for line in text.splitlines())
    assert f"{found['processor']['usable_cores']} usable of" in text
    for package in found["packages"]:
        assert package["version"] in " ".join(text.split())
    for name, extra in found["extras"].items():
        assert f"\n  {name}: " in text
        assert extra["brings"] in " ".join(text.split()) and extra["used"] in " ".join(text.split())
        assert ("python -m pip install " in extra["install"]) and (extra["usable"] == (extra["reason"] is None))


def test_an_unwritable_file_is_one_line(few_extras: None, tmp_path: Path) -> None:
    # Below a file, since permissions bind no one who is root.
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--json: \S*/file/found.json cannot be written"):
        doctor.doctor(json_file=tmp_path / "file" / "found.json")


def test_packages_outside_their_range_and_missing_ones_are_named_with_the_cure(
    few_extras: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == "numpy":
            raise extras.PackageNotFoundError(name)
        return "1.0" if name == "torch" else "2.14.9"

    monkeypatch.setattr(extras, "version", version)
    core = [Requirement("torch>=2.14,<2.15"), Requirement("numpy>=2.0,<3"), Requirement("triton>=2,<3")]
    monkeypatch.setattr(doctor, "required", lambda: (core, {}))
    text = " ".join(doctor.doctor().split())
    assert "torch 1.0, tested with" in text and "numpy is missing, tested with" in text
    assert 'python -m pip install "torch<2.15,>=2.14" "numpy<3,>=2.0" ' in text  # and not triton, which fits


def test_a_probe_that_fails_crashes_or_hangs_is_a_reason() -> None:
    assert extras.probe("print('noise')") is None
    assert extras.probe("import sys; print('warning', file=sys.stderr); raise ImportError('libfoo.so')") == (
        "ImportError: libfoo.so"
    )
    assert extras.probe("import os; os.kill(os.getpid(), 11)") == "its import ended the process with signal 11"
    assert extras.probe("import time; time.sleep(9)", seconds=0.3) == "its import took more than 0.3 s"


def test_an_extra_without_its_gpu_is_installed_and_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "version", lambda name: "10.13")
    never = extras.Extra("speed", "not used by the engine yet", probe="import os; os.abort()", needs_gpu=True)
    requirements = [Requirement("tensorrt>=10.13,<12")]
    found = extras._examine(never, requirements, gpu=False)
    assert found["installed"] and found["reason"] == "no GPU that torch can use"
    assert "signal" in extras._examine(never, requirements, gpu=True)["reason"]
    assert extras._examine(never, [Requirement("tensorrt>=11")], gpu=True)["reason"].startswith("outside the tested")


def test_what_is_missing_for_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_driver", lambda: None)
    assert "nvidia-smi is not on the PATH" in machine.examine_gpu()["missing"]
    monkeypatch.setattr(machine, "_driver", lambda: "470.1")
    assert "470.1 is there" in machine.examine_gpu()["missing"]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in machine.examine_gpu()["missing"]


def test_a_gpu_is_described(few_extras: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class About:
        name, total_memory, major, minor = "Some GPU", 80 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: About)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (40 * 2**30, 80 * 2**30))
    monkeypatch.setattr(machine, "_driver", lambda: "580.1")
    monkeypatch.setattr("diffdfkd.kernels.launch.launch_fault", lambda: "Triton needs a C compiler")
    assert "kernel=auto takes kernel=reference, plain torch: Triton needs a C compiler" in " ".join(
        doctor.doctor().split()
    )
    monkeypatch.setattr("diffdfkd.kernels.launch.launch_fault", lambda: None)
    text = " ".join(doctor.doctor().split())
    assert "GPU Some GPU, 80.0 GiB (40.0 GiB free), compute capability 9.0, driver 580.1" in text
    assert "GPU none" not in text
    assert "kernels kernel=auto takes kernel=triton, the fused kernels" in text


@pytest.mark.parametrize(
    ("line", "features"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16", ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]),
        ("Features\t: fp asimd bf16", ["asimd", "bf16"]),
        ("", []),
    ],
)
def test_features_are_read_from_cpuinfo(line: str, features: list[str], tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: Some CPU\n{line}\n")
    found = machine.examine_processor(tmp_path / "cpuinfo")
    assert (found["model"], found["features"]) == ("Some CPU", features)
    assert found["usable_cores"] == len(os.sched_getaffinity(0))


def test_the_control_group_limits_memory_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    outer, inner = tmp_path, tmp_path / "inner"
    inner.mkdir()
    (outer / "memory.max").write_text("2147483648\n")
    (inner / "memory.max").write_text("4294967296\n")
    (inner / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(machine, "_groups", lambda: [inner, outer])
    assert machine.examine_memory(tmp_path / "meminfo") == {"total": 2**33, "available": 2**32, "limit": 2**31}
    assert machine.examine_processor()["core_quota"] == 1.5
    (outer / "memory.max").write_text("9223372036854771712\n")  # version 1's word for none
    (inner / "memory.max").write_text("max\n")
    assert machine.examine_memory(tmp_path / "meminfo")["limit"] is None


@pytest.mark.slow
def test_every_extra_is_probed_for_real() -> None:
    found: dict[str, Any] = doctor.examine()
    assert set(found["extras"]) == set(extras.EXTRAS)
    for extra in found["extras"].values():
        assert extra["usable"] == (extra["reason"] is None)
        assert extra["installed"] or extra["reason"].startswith("not installed: ")
    # The test extra brings both, and neither needs a GPU.
    assert found["extras"]["timm"]["usable"] and found["extras"]["onnxruntime"]["usable"]
