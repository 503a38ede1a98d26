"""What the kernels become on each GPU architecture: compiled without a GPU, at the sizes that they are used at.

    python -m diffdfkd.kernels.ahead_of_time --json kernels.json --csv benchmarks/results/kernels-ahead-of-time.csv

A row is a kernel at one configuration on one architecture, compiled as a launch there would compile it:

    registers, spills          of a thread; bytes of it that found no register
    shared_bytes               of a program
    load_bits, store_bits      the narrowest access of a sample's own elements; none where there is no such access
    bytes_per_element          moved in global memory for a sample that is not mixed; machine_code.py says how this is
                               read off the PTX
    minimum_bytes_per_element  what has to be read and written, told from the operation
    overhead_accesses          instructions that load or store anything else: coefficients, flags, partial sums
    wide                       whether the configuration promises accesses of at least 128 bits
    note                       why figures are missing

The exit status is 1, with a line for each violation, where a kernel spills, breaks that promise or moves more than 5 %
above the minimum: CI can gate on it. A figure that is promised and cannot be read off is a violation too.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from diffdfkd.kernels.configurations import Configuration, configurations
from diffdfkd.kernels.launch import INTERPRETED, Launch
from diffdfkd.kernels.machine_code import (
    Unreadable,
    bytes_per_element,
    narrowest,
    other_accesses,
    read_program,
    resources,
)

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""A100; RTX 30; RTX 40; H100; B200; RTX 50."""

WIDE = 128
TOLERANCE = 1.05


@dataclass(frozen=True)
class Compiled:
    kernel: str
    configuration: str
    arch: int
    registers: int
    spills: int
    shared_bytes: int
    load_bits: int | None
    store_bits: int | None
    bytes_per_element: float | None
    minimum_bytes_per_element: int | None
    overhead_accesses: int | None
    wide: bool
    note: str


def compile_launch(launch: Launch, arch: int) -> tuple[Any, list[str]]:
    """Triton's compiled kernel for an architecture (90: sm_90) and the names of the parameters that are left in it.

    Types and alignments are told by the functions that a launch calls, so that the machine code is the launch's own.
    """
    function, target = launch.kernel, GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    values = {
        **launch.arguments,
        **launch.constants,
        "num_warps": launch.warps,
        "debug": function.debug or triton.knobs.runtime.debug,
        "instrumentation_mode": triton.knobs.compilation.instrumentation_mode,
    }
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = bind(**values)
    options, signature, constants, attributes = function._pack_args(backend, values, bound, specialization, options)
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    return compiled, [name for name, kind in signature.items() if kind != "constexpr"]


def measure(configuration: Configuration, arch: int) -> Compiled:
    """Compiles one configuration for one architecture and reads its row off."""
    launch = configuration.launch()
    compiled, names = compile_launch(launch, arch)
    used = resources(compiled.asm["cubin"])
    numbers = launch.arguments[configuration.data].numel() if configuration.data is not None else 0
    elements = {
        at: value.element_size()
        for at, value in enumerate(launch.arguments.get(name) for name in names)
        if isinstance(value, Tensor) and value.numel() in (numbers, 2 * numbers)
    }
    skipped = [names.index(name) for name in configuration.skipped]
    load = store = moved = others = None
    note = ""
    try:
        program = read_program(compiled.asm["ptx"])
        load, store = (narrowest(program, elements, store=store) for store in (False, True))
        others = other_accesses(program, elements)
        if configuration.data is not None:
            moved = round(bytes_per_element(program, elements, configuration.coverage(launch), skipped), 3)
    except Unreadable as error:
        note = str(error)
    return Compiled(
        configuration.kernel, configuration.name, arch, used.registers, used.spilled, compiled.metadata.shared, load,
        store, moved, configuration.minimum, others, configuration.wide, note,
    )  # fmt: skip


def violations(row: Compiled) -> list[str]:
    """What the row breaks, a line each."""
    found = []
    if row.spills:
        found.append(f"spills {row.spills} bytes a thread")
    for name, bits in (("load", row.load_bits), ("store", row.store_bits)):
        if row.wide and bits is not None and bits < WIDE:
            found.append(f"its narrowest {name} has {bits} bits; {WIDE} are promised")
    least, moved = row.minimum_bytes_per_element, row.bytes_per_element
    if least is not None and moved is not None and not least <= moved <= TOLERANCE * least:
        found.append(f"moves {moved:g} bytes per element; {least} are to be moved")
    if row.note and (row.wide or least is not None):
        found.append(f"cannot be read off: {row.note}")
    return [f"{row.kernel}, {row.configuration}, sm_{row.arch}: {line}" for line in found]


def compile_all(chosen: Sequence[Configuration], architectures: Sequence[int]) -> list[Compiled]:
    """A row for each configuration and architecture; as many are compiled at once as there are cores."""
    jobs = [(configuration, arch) for configuration in chosen for arch in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: measure(*job), jobs))


def write(rows: Sequence[Compiled], json_file: Path, csv_file: Path | None) -> None:
    knobs = triton.knobs.nvidia
    head = {
        "triton": triton.__version__,
        "ptxas": knobs.ptxas.version,
        "ptxas_blackwell": knobs.ptxas_blackwell.version,
    }
    json_file.write_text(json.dumps({**head, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if csv_file is not None:
        with csv_file.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*(field.name for field in fields(Compiled)), "triton"])
            writer.writerows([*asdict(row).values(), triton.__version__] for row in rows)


def show(rows: Sequence[Compiled]) -> None:
    line = "{:<20}{:<41}{:>3}{:>6}{:>8}{:>8}{:>6}{:>7}{:>7}{:>9}{:>7}".format
    print(
        line("kernel", "configuration", "sm", "regs", "spills", "shared", "load", "store", "bytes", "minimum", "other")
    )
    for row in rows:
        print(line(*("-" if value is None else value for value in astuple(row)[:11])), row.note)


def main(arguments: Sequence[str] | None = None) -> int:
    if INTERPRETED:
        print("ahead_of_time: TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it", file=sys.stderr)
        return 2
    known = configurations()
    parser = argparse.ArgumentParser(
        description="Compiles the kernels without a GPU; status 1 where one breaks a promise."
    )
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    parser.add_argument("--csv", type=Path, help="file for the same as a table")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="such as 80 90; all, if not given")
    parser.add_argument("--kernel", nargs="+", choices=sorted({one.kernel for one in known}), help="all, if not given")
    options = parser.parse_args(arguments)
    rows = compile_all([one for one in known if one.kernel in (options.kernel or (one.kernel,))], options.arch)
    write(rows, options.json, options.csv)
    show(rows)
    broken = [line for row in rows for line in violations(row)]
    print(*broken, sep="\n", end="\n" if broken else "", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
