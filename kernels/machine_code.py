"""What can be read off a compiled kernel without running it: its resources from the cubin, its traffic from the PTX.

Each register's origins are followed through the program: the kernel's parameters, the thread, what was loaded. An
access whose address comes from a tensor with one number per element, and from the thread, moves elements. Such an
access is gathered where its address also depends on what was loaded (a CutMix partner), and a sample's own otherwise.

Bytes are summed along the cheapest way through the control flow that reaches each of the tensors: a branch that is
skipped for most samples does not count, a masked access counts in full, and a loop counts as often as it is said to
run. One that LLVM unrolled in part is taken to do so several times over: it shows as too many bytes, never too few.
"""

import heapq
import math
import re
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import triton

from diffdfkd.kernels.control_flow import Loop, Unreadable, find_loops, reachable, unwound

THREAD, LOADED, SHARED = "thread", "loaded", "shared"
Origins = frozenset[int | str]
"""The kernel's parameters, by number, and the three above."""

_REGISTER = re.compile(r"%[\w.]+")
_SPECIAL = {"%tid.x", "%tid.y", "%tid.z", "%laneid", "%warpid"}
_ELSEWHERE = {"shared", "local", "param", "const"}
_OPAQUE = ("call", "brx", "cp.async.bulk", "cp.reduce", "multimem", "tensormap")
_LEAVING = {"bra", "ret", "exit", "trap"}
_WITHOUT_RESULT = {*_LEAVING, "st", "red", "bar", "barrier", "cp", "fence", "membar", "prefetch"}


class Resources(NamedTuple):
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread's stack and local memory: spilled registers, and arrays that found no registers."""


class Access(NamedTuple):
    """A load from global memory, or a store to it."""

    parameters: frozenset[int]
    """Of the kernel, from which the address comes."""
    bits: int
    store: bool
    threaded: bool
    """The address depends on the thread."""
    gathered: bool
    """The address depends on what was loaded."""

    def moves(self, elements: Collection[int]) -> bool:
        """Whether it moves elements of these parameters."""
        return self.threaded and not self.parameters.isdisjoint(elements)


class Coverage(NamedTuple):
    """How many elements a program takes: tile (first + trips)."""

    tile: int
    """Elements of one load or store of the kernel's source."""
    trips: int = 1
    """How often its loop over tiles runs, if it has one."""
    first: int = 0
    """Tiles that it takes outside of the loop."""


@dataclass(frozen=True)
class Program:
    """A kernel as its basic blocks; the last one, which is empty, is where it ends."""

    threads: int
    accesses: list[list[Access]]
    successors: list[list[int]]


@dataclass(frozen=True)
class _Instruction:
    guarded: bool
    opcode: str
    operands: str
    results: frozenset[str]
    sources: frozenset[str]


def resources(cubin: bytes) -> Resources:
    """Of a cubin with one kernel, as cuobjdump tells them."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    registers, stack, local = map(int, usage)
    return Resources(registers, stack + local)


def read_program(ptx: str) -> Program:
    """The one kernel of a PTX text; raises Unreadable."""
    entry = re.search(r"\.entry\s+[\w$]+\s*\([^)]*\)(.*?)\n\{(.*?)\n\}", ptx, re.DOTALL)
    if entry is None:
        raise Unreadable("no kernel in the PTX")
    size = re.search(r"\.(?:req|max)ntid\s+([\d, ]+)", entry[1])
    if size is None:
        raise Unreadable("the PTX does not say how many threads a program has")
    statements = list(_statements(entry[2]))
    targets = {_target(one) for one in statements if not isinstance(one, str) and _stem(one) == "bra"}
    labels: dict[str, int] = {}
    blocks: list[list[_Instruction]] = [[]]
    for statement in statements:
        if not isinstance(statement, str):
            blocks[-1].append(statement)
        elif statement in targets:  # the others only mark lines of the source
            if blocks[-1]:
                blocks.append([])
            labels[statement] = len(blocks) - 1
        if not isinstance(statement, str) and _stem(statement) in _LEAVING:
            blocks.append([])
    blocks.append([])
    origins = _origins([instruction for block in blocks for instruction in block])
    return Program(
        math.prod(int(n) for n in size[1].split(",")),
        [[access for instruction in block for access in _accesses(instruction, origins)] for block in blocks],
        [_successors(block, at, labels, len(blocks) - 1) for at, block in enumerate(blocks)],
    )


def narrowest(program: Program, elements: Collection[int], *, store: bool) -> int | None:
    """Bits of the narrowest load or store of a sample's own elements; None where there is none."""
    own = [access for block in program.accesses for access in block if access.moves(elements) and not access.gathered]
    return min((access.bits for access in own if access.store == store), default=None)


def other_accesses(program: Program, elements: Collection[int]) -> int:
    """How many loads and stores move no elements: coefficients, flags, partial sums."""
    return sum(not access.moves(elements) for block in program.accesses for access in block)


def bytes_per_element(
    program: Program, elements: Mapping[int, int], coverage: Coverage, skipped: Collection[int] = ()
) -> float:
    """Bytes moved for one element on the cheapest way through the program that reaches each tensor.

    ``elements`` gives the bytes of a number of each tensor with one per element, by the parameter; a tensor that is
    ``skipped`` need not be reached. Raises Unreadable for loops within loops.
    """
    loops = [loop for loop in find_loops(program.successors) if _touched(program, loop.body, elements, skipped)]
    costs = []
    for at, block in enumerate(program.accesses):
        moved = sum(_moved(access, program.threads, elements, coverage.tile) for access in block)
        around = sum(at in loop.body for loop in loops)
        if moved and around > 1:
            raise Unreadable("elements are moved in a loop within a loop")
        costs.append(moved * coverage.trips if around else moved)
    reached: list[frozenset[int | Loop]] = [
        frozenset([*_touched(program, [at], elements, skipped), *(loop for loop in loops if at in loop.latches)])
        for at in range(len(costs))
    ]
    way = _cheapest_way(unwound(program.successors), costs, reached)
    return sum(costs[at] for at in way) / (coverage.tile * (coverage.first + coverage.trips))


def _statements(body: str) -> Iterator[str | _Instruction]:
    """Labels and instructions of a kernel's body."""
    body = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", body, flags=re.MULTILINE)
    for text in body.split(";"):
        text = text.lstrip("{} \t\n")
        while label := re.match(r"([$\w]+):(?!:)", text):
            yield label[1]
            text = text[label.end() :].lstrip("{} \t\n")
        if not text or text.startswith("."):
            continue
        found = re.fullmatch(r"(@!?%[\w.]+\s+)?([\w.:]+)(.*)", text, re.DOTALL)
        if found is None or found[2].startswith(_OPAQUE):
            raise Unreadable(f"the analysis does not know {text.splitlines()[0].strip()}")
        guard, opcode, operands = found[1] or "", found[2], found[3].strip()
        first = re.match(r"\{[^}]*\}|[^,]*", operands)
        result = first[0] if first is not None and opcode.split(".")[0] not in _WITHOUT_RESULT else ""
        results = frozenset(re.findall(_REGISTER, result))
        sources = frozenset(re.findall(_REGISTER, operands[len(result) :]))
        yield _Instruction(bool(guard), opcode, operands, results, sources)


def _stem(instruction: _Instruction) -> str:
    return instruction.opcode.split(".")[0]


def _target(branch: _Instruction) -> str:
    return branch.operands.split()[-1]


def _space(instruction: _Instruction) -> str:
    """Where a load or store goes; an address without a space may be global."""
    spaces = {part.split("::")[0] for part in instruction.opcode.split(".")} & _ELSEWHERE
    return spaces.pop() if spaces else "global"


def _origins(instructions: list[_Instruction]) -> dict[str, Origins]:
    """What each register's value comes from, over all of its definitions."""
    origins: dict[str, Origins] = dict.fromkeys(_SPECIAL, frozenset([THREAD]))
    changed = True
    while changed:
        changed = False
        for instruction in instructions:
            of = _joined(instruction.sources, origins)
            if _stem(instruction) in ("ld", "ldu", "atom"):
                of = _loaded(instruction, of)
            for register in instruction.results:
                before = origins.get(register, frozenset())
                if not of <= before:
                    origins[register] = before | of
                    changed = True
    return origins


def _joined(registers: Iterable[str], origins: Mapping[str, Origins]) -> Origins:
    return frozenset[int | str]().union(*(origins.get(register, frozenset()) for register in registers))


def _loaded(instruction: _Instruction, address: Origins) -> Origins:
    """Origins of a loaded value: a number read through a pointer is no pointer into the same tensor."""
    space = _space(instruction)
    if space == "param":
        return frozenset(int(number) for number in re.findall(r"_param_(\d+)", instruction.operands))
    return (address & {THREAD, LOADED, SHARED}) | {SHARED if space == "shared" else LOADED}


def _accesses(instruction: _Instruction, origins: dict[str, Origins]) -> Iterator[Access]:
    """The loads and stores of global memory that an instruction makes."""
    stem, parts = _stem(instruction), instruction.opcode.split(".")
    addresses = re.findall(r"\[([^\]]*)\]", instruction.operands)
    if stem == "cp" and "global" in parts:
        bits = 8 * int(instruction.operands.split("]")[-1].split(",")[1], 0)
        address, kinds = addresses[1], [False]
    elif stem in ("ld", "ldu", "st", "atom", "red") and _space(instruction) == "global":
        bits = _bits(parts)
        address, kinds = addresses[0], {"st": [True], "atom": [False, True], "red": [False, True]}.get(stem, [False])
    else:
        return
    of = _joined(re.findall(_REGISTER, address), origins)
    if SHARED in of:
        raise Unreadable(f"an address of global memory comes out of shared memory: {instruction.opcode}")
    for store in kinds:
        yield Access(frozenset(n for n in of if isinstance(n, int)), bits, store, THREAD in of, LOADED in of)


def _bits(parts: list[str]) -> int:
    """That an opcode such as ld.global.v4.b32 moves."""
    widths = [found for part in parts if (found := re.fullmatch(r"(?:b|u|s|f|bf)(\d+)(x2)?", part))]
    if len(widths) != 1:
        raise Unreadable(f"the width of {'.'.join(parts)}")
    vector = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d+", part)), 1)
    return int(widths[0][1]) * (2 if widths[0][2] else 1) * vector


def _successors(block: list[_Instruction], at: int, labels: dict[str, int], end: int) -> list[int]:
    if at == end:
        return []
    last = block[-1] if block else None
    if last is None or _stem(last) not in _LEAVING:
        return [at + 1]
    target = labels[_target(last)] if _stem(last) == "bra" else end
    return sorted({target, at + 1}) if last.guarded else [target]


def _moved(access: Access, threads: int, elements: Mapping[int, int], tile: int) -> float:
    """Bytes; threads beyond the elements there are move the same ones again."""
    if not access.moves(elements):
        return 0
    number = max(elements[parameter] for parameter in access.parameters if parameter in elements)
    return min(threads * access.bits / 8, tile * number)


def _touched(
    program: Program, blocks: Collection[int], elements: Collection[int], skipped: Collection[int]
) -> set[int]:
    """Parameters whose own elements are moved in the blocks."""
    own = [access for at in blocks for access in program.accesses[at] if not access.gathered]
    moved = {number for access in own if access.moves(elements) for number in access.parameters}
    return {number for number in moved if number in elements and number not in skipped}


def _cheapest_way(
    successors: list[list[int]], costs: list[float], reached: list[frozenset[int | Loop]]
) -> tuple[int, ...]:
    """Blocks from the first to the last, on the cheapest way that reaches all there is to reach (Dijkstra)."""
    wanted = frozenset[int | Loop]().union(*(reached[at] for at in reachable(successors, 0)))
    queue: list[tuple[float, tuple[int, ...]]] = [(costs[0], (0,))]
    settled = set()
    while queue:
        cost, way = heapq.heappop(queue)
        at, got = way[-1], frozenset[int | Loop]().union(*(reached[block] for block in way))
        if at == len(costs) - 1 and got == wanted:
            return way
        if (at, got) not in settled:
            settled.add((at, got))
            for target in successors[at]:
                heapq.heappush(queue, (cost + costs[target], (*way, target)))
    raise Unreadable("no way through the program reaches every tensor")
