"""The table of compiled kernels. Compilation runs beside these tests, which have Triton's interpreter on."""

import csv
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import triton

from diffdfkd.kernels import ahead_of_time
from diffdfkd.kernels.ahead_of_time import Compiled, main, violations
from diffdfkd.kernels.configurations import configurations

TABLE = Path(ahead_of_time.__file__).parent.parent / "benchmarks/results/kernels-ahead-of-time.csv"

FIRST_OF_EACH = """
import json
from dataclasses import asdict
from types import SimpleNamespace
import triton
from triton.backends.compiler import GPUTarget
from diffdfkd.kernels.ahead_of_time import compile_all, compile_launch
from diffdfkd.kernels.configurations import configurations

first = list({one.kernel: one for one in reversed(configurations())}.values())
rows = compile_all(first, (80, 90))

# A driver as of a machine with an H100: what a launch would compile there.
triton.runtime.driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
))
alike = {}
for one in first:
    launch = one.launch()
    by_launch = launch.kernel.warmup(
        grid=launch.grid, **launch.arguments, **launch.constants, num_warps=launch.warps
    )
    alike[one.kernel] = by_launch.hash == compile_launch(launch, 90)[0].hash
print(json.dumps({"rows": [asdict(row) for row in rows], "alike": alike}))
"""

COPIES = """
import sys
import torch, triton
import triton.language as tl
from diffdfkd.kernels import ahead_of_time
from diffdfkd.kernels.ahead_of_time import main
from diffdfkd.kernels.configurations import Configuration
from diffdfkd.kernels.launch import Launch


@triton.jit
def copy(x, y, n, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in tl.static_range(TIMES):
        tl.store(y + i, tl.load(x + i, mask=i < n, volatile=True), mask=i < n)


def copying(name, first, times):
    arguments = {"x": torch.empty(4096 + first)[first:], "y": torch.empty(4096), "n": 4096}
    launch = Launch(copy, (4,), arguments, {"TIMES": times, "BLOCK": 1024}, 4)
    return Configuration("copy", name, lambda: launch, "x", minimum=8)


ahead_of_time.configurations = lambda: [copying(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))]
sys.exit(main(["--json", "rows.json", "--csv", "rows.csv", "--arch", "80", "100"]))
"""


def compiled(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python with Triton's compiler in the place of its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def first_of_each() -> dict[str, Any]:
    """The first configuration of every kernel, on two architectures."""
    done = compiled("-c", FIRST_OF_EACH)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture
def rows(first_of_each: dict[str, Any]) -> list[Compiled]:
    return [Compiled(**row) for row in first_of_each["rows"]]


def test_a_launch_would_compile_the_same(first_of_each: dict[str, Any]) -> None:
    """By Triton's hash of source, types, alignments, constants and options."""
    assert first_of_each["alike"] == {one.kernel: True for one in configurations()}


def test_every_kernel_compiles_without_a_gpu(rows: list[Compiled]) -> None:
    assert {row.kernel for row in rows} == {one.kernel for one in configurations()}
    assert {row.arch for row in rows} == {80, 90}
    assert all(0 < row.registers <= 255 for row in rows)


def test_every_kernel_is_in_the_table() -> None:
    """One that is added without a configuration would escape the gate."""
    modules = [path.stem for path in Path(ahead_of_time.__file__).parent.glob("*.py")]
    kernels = {
        f"{name}.{attribute}": value
        for name in modules
        for attribute, value in vars(importlib.import_module(f"diffdfkd.kernels.{name}")).items()
        if attribute.startswith("_") and attribute.endswith("_kernel")
    }
    assert len(kernels) >= 8
    launched = [one.launch().kernel for one in configurations()]
    assert [name for name, value in kernels.items() if all(kernel is not value for kernel in launched)] == []


def test_kernels_keep_what_they_promise(rows: list[Compiled]) -> None:
    assert [line for row in rows for line in violations(row)] == []


def test_figures_of_a_known_kernel(rows: list[Compiled]) -> None:
    """One program of 32 threads for each of the demo's samples: z, two outputs, x0 and eps_hat of four bytes."""
    (row,) = [row for row in rows if (row.kernel, row.arch) == ("predict", 90)]
    assert row.configuration == "demo, CFG, fp32"
    assert (row.load_bits, row.store_bits, row.bytes_per_element, row.note) == (128, 128, 20.0, "")


KEPT = Compiled("k", "c", 80, 40, 0, 0, 128, 128, 16.0, 16, 9, True, "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"bytes_per_element": 16.8}, []),
        ({"load_bits": None, "store_bits": None, "bytes_per_element": None, "minimum_bytes_per_element": None}, []),
        ({"load_bits": 32, "wide": False}, []),
        ({"spills": 8}, ["spills 8 bytes"]),
        ({"load_bits": 64}, ["narrowest load has 64 bits"]),
        ({"store_bits": 16}, ["narrowest store has 16 bits"]),
        ({"bytes_per_element": 17.0}, ["moves 17 bytes"]),
        ({"bytes_per_element": 12.0}, ["moves 12 bytes"]),
        ({"bytes_per_element": None, "note": "a call"}, ["cannot be read off: a call"]),
        ({"note": "a call", "wide": False, "minimum_bytes_per_element": None}, []),
        ({"spills": 4, "load_bits": 8}, ["spills 4", "8 bits"]),
    ],
)
def test_violations(changes: dict[str, Any], words: list[str]) -> None:
    found = violations(replace(KEPT, **changes))
    assert len(found) == len(words)
    assert all(word in line and line.startswith("k, c, sm_80: ") for word, line in zip(words, found, strict=True))


@pytest.mark.parametrize(
    ("name", "first", "times", "status", "words"),
    [
        ("wide", 0, 1, 0, []),
        ("narrow", 1, 1, 1, ["copy, narrow, sm_80: its narrowest load has 32 bits", "copy, narrow, sm_100: its"]),
        ("twice", 0, 2, 1, ["copy, twice, sm_80: moves 16 bytes", "copy, twice, sm_100: moves 16 bytes"]),
    ],
)
def test_the_gate(tmp_path: Path, name: str, first: int, times: int, status: int, words: list[str]) -> None:
    """A copy from a tensor that does not start at a multiple of 16 bytes is narrow, one done twice moves too much."""
    (tmp_path / "copies.py").write_text(COPIES)
    done = compiled("copies.py", name, str(first), str(times), cwd=tmp_path)
    assert done.returncode == status, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(words)
    assert all(line.startswith(word) for word, line in zip(words, lines, strict=True))
    assert len(done.stdout.splitlines()) == 3  # the heading and a row for each architecture
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["triton"] == triton.__version__
    assert written["ptxas"] and written["ptxas_blackwell"]
    with (tmp_path / "rows.csv").open(newline="") as file:
        told = list(csv.DictReader(file))
    assert [(row["arch"], row["triton"]) for row in told] == [("80", triton.__version__), ("100", triton.__version__)]
    assert [row["bytes_per_element"] for row in told] == [str(row["bytes_per_element"]) for row in written["rows"]]


def test_the_interpreter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ahead_of_time, "INTERPRETED", True)
    assert main(["--json", str(tmp_path / "rows.json")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "TRITON_INTERPRET" in told[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_table(tmp_path: Path) -> None:
    command = ["-m", "diffdfkd.kernels.ahead_of_time", "--json", "rows.json", "--csv", "rows.csv"]
    done = compiled(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made, committed = (tmp_path / "rows.csv").read_text(), TABLE.read_text()
    if committed.splitlines()[1].split(",")[-1] != triton.__version__:
        pytest.skip(f"{TABLE.name} is not of Triton {triton.__version__}: make it again")
    assert made == committed
