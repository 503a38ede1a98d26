"""What is read off PTX and cubin, on texts short enough to count by hand."""

import subprocess
from pathlib import Path

import pytest
import triton

from diffdfkd.kernels.machine_code import (
    Coverage,
    Program,
    Unreadable,
    bytes_per_element,
    find_loops,
    narrowest,
    other_accesses,
    read_program,
    resources,
)

X, Y, FLAGS = 0, 1, 2
ELEMENTS = {X: 4, Y: 4}
TILE = Coverage(128)  # of 32 threads with four float32 each

LOAD_X = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd3];"
STORE_Y = "st.global.v4.b32 [%rd4], {%r1, %r2, %r3, %r4};"


def program(body: str, threads: str = "32") -> Program:
    """A kernel of x, y and flags, with %rd3 the thread's place in x, %rd4 in y, and %rd5 the flag of the program."""
    return read_program(f"""
.version 8.8
.visible .entry k(
    .param .u64 .ptr .global .align 1 k_param_0,
    .param .u64 k_param_1,
    .param .u64 k_param_2
)
.reqntid {threads}
{{
    .reg .b32 %r<99>;
    .loc 1 2 3  // for debuggers; without a semicolon
    ld.param.b64 %rd0, [k_param_0];
    ld.param.b64 %rd1, [k_param_1];
    ld.param.b64 %rd2, [k_param_2];
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %rd3, %r0, 16, %rd0;
    mad.wide.u32 %rd4, %r0, 16, %rd1;
    mov.u32 %r9, %ctaid.x;
    mad.wide.u32 %rd5, %r9, 4, %rd2;
$L__tmp0:
    {body}
}}
    .section .debug_str
""")


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [
        ("ld.global.b8", 8),
        ("ld.global.u16", 16),
        ("ld.volatile.global.b32", 32),
        ("ld.b64", 64),
        ("ld.global.v2.b32", 64),
        ("ld.global.v2.bf16x2", 64),
        ("ld.global.nc.L1::evict_last.L2::128B.v4.f32", 128),
        ("ld.global.v8.b32", 256),
        ("ld.global.v4.b64", 256),
    ],
)
def test_width_of_a_load(opcode: str, bits: int) -> None:
    assert narrowest(program(f"{opcode} {{%r1}}, [ %rd3 + 0 ]; ret;"), ELEMENTS, store=False) == bits


def test_one_narrow_access_is_found_among_wide_ones() -> None:
    code = program(
        f"{LOAD_X} ld.global.b16 {{%rs1}}, [%rd3+32]; {STORE_Y} st.global.v2.b32 [%rd4+64], {{%r1, %r2}}; ret;"
    )
    assert narrowest(code, ELEMENTS, store=False) == 16
    assert narrowest(code, ELEMENTS, store=True) == 64


def test_there_may_be_no_such_access() -> None:
    assert narrowest(program(f"{LOAD_X} ret;"), ELEMENTS, store=True) is None


def test_bytes_of_a_straight_program() -> None:
    assert bytes_per_element(program(f"{LOAD_X} {STORE_Y} ret;"), ELEMENTS, TILE) == 8


def test_predicated_access_counts_in_full() -> None:
    """As Triton writes it: inline assembly that first sets what a masked load leaves."""
    code = program(f"""
        setp.lt.s32 %p1, %r0, 7;
        // begin inline asm
        mov.u32 %r1, 0x0;
        @%p1 {LOAD_X}
        // end inline asm
        @!%p1 {STORE_Y}
        ret;""")
    assert len(code.successors) == 3  # the program, what would follow its return, the end
    assert bytes_per_element(code, ELEMENTS, TILE) == 8


def test_flags_and_coefficients_are_no_elements() -> None:
    """Neither one number of a program, nor a thread's number of a tensor that has none per element."""
    code = program(f"""
        ld.global.b32 {{%r20}}, [%rd5];
        mad.wide.u32 %rd6, %r0, 4, %rd2;
        ld.global.b8 {{%rs1}}, [%rd6];
        ld.global.b32 {{%r21}}, [%rd0+8];
        {LOAD_X} {STORE_Y} ret;""")
    assert other_accesses(code, ELEMENTS) == 3
    assert narrowest(code, ELEMENTS, store=False) == 128
    assert bytes_per_element(code, ELEMENTS, TILE) == 8


SKIPPED_BRANCH = f"""
    ld.global.b32 {{%r20}}, [%rd5];
    setp.eq.s32 %p1, %r20, 0;
    {STORE_Y}
    @%p1 bra $L__BB0_2;
    {LOAD_X}
$L__BB0_2:
    ret;"""


def test_a_branch_that_is_skipped_does_not_count() -> None:
    code = program(SKIPPED_BRANCH)
    assert bytes_per_element(code, ELEMENTS, TILE, skipped=[X]) == 4


def test_unless_a_tensor_is_reached_there_alone() -> None:
    assert bytes_per_element(program(SKIPPED_BRANCH), ELEMENTS, TILE) == 8


def test_a_narrow_access_in_a_skipped_branch_is_still_narrow() -> None:
    code = program(SKIPPED_BRANCH.replace(LOAD_X, "ld.global.b32 {%r1}, [%rd3];"))
    assert narrowest(code, ELEMENTS, store=False) == 32


def test_the_cheaper_of_two_branches_counts() -> None:
    code = program(f"""
        @%p1 bra $L__BB0_2;
        {LOAD_X} {LOAD_X}
        bra.uni $L__BB0_3;
    $L__BB0_2:
        {LOAD_X}
    $L__BB0_3:
        {STORE_Y} ret;""")
    assert bytes_per_element(code, ELEMENTS, TILE) == 8


def test_an_early_return_is_no_way_around_the_elements() -> None:
    code = program(f"@%p1 ret; {LOAD_X} {STORE_Y} ret;")
    assert bytes_per_element(code, ELEMENTS, TILE) == 8


def test_what_a_partner_gives_is_gathered() -> None:
    """Its place is loaded: no access of the sample's own, though it counts on the way that reads it."""
    partner = """
        ld.global.b32 {%r20}, [%rd5];
        mad.wide.u32 %rd6, %r20, 4096, %rd3;
        ld.global.b32 {%r21}, [%rd6];"""
    code = program(f"{LOAD_X} {partner} {STORE_Y} ret;")
    assert narrowest(code, ELEMENTS, store=False) == 128
    assert bytes_per_element(code, ELEMENTS, TILE) == 9
    # What is read of x is no pointer into x.
    code = program("ld.global.b32 {%r20}, [%rd3]; mad.wide.u32 %rd6, %r20, 4, %rd2; ld.global.b32 {%r1}, [%rd6]; ret;")
    assert other_accesses(code, ELEMENTS) == 1


def loop(body: str, guard: str = "") -> str:
    """A loop over tiles, which the guard may pass by, as LLVM turns it: the condition last."""
    return f"""
        mov.b32 %r30, 0;
        {guard}
    $L__BB0_1:
        {body}
        add.s32 %r30, %r30, 128;
        setp.lt.s32 %p2, %r30, %r31;
        @%p2 bra $L__BB0_1;
    $L__BB0_2:"""


def test_a_loop_counts_its_trips() -> None:
    code = program(loop(LOAD_X) + "ret;")
    assert [loop.body for loop in find_loops(code.successors)] == [{1}]
    assert bytes_per_element(code, ELEMENTS, Coverage(128, trips=5)) == 4
    assert bytes_per_element(program(loop(LOAD_X + LOAD_X) + "ret;"), ELEMENTS, Coverage(128, trips=5)) == 8


def test_a_loop_is_not_passed_by() -> None:
    code = program(loop(LOAD_X, guard="@%p1 bra $L__BB0_2;") + f"{LOAD_X} ret;")
    # Four trips of the loop and the tile behind it cover five tiles.
    assert bytes_per_element(code, ELEMENTS, Coverage(128, trips=4, first=1)) == 4


def test_a_loop_whose_condition_comes_first() -> None:
    code = program(f"""
    $L__BB0_1:
        @%p1 bra $L__BB0_2;
        {LOAD_X}
        bra.uni $L__BB0_1;
    $L__BB0_2:
        ret;""")
    assert bytes_per_element(code, ELEMENTS, Coverage(128, trips=3)) == 4


def test_two_loops_over_the_same_elements_add_up() -> None:
    second = loop(LOAD_X + STORE_Y).replace("BB0_1", "BB0_3").replace("BB0_2", "BB0_4")
    code = program(f"{loop(LOAD_X)} {second} ret;")
    assert bytes_per_element(code, ELEMENTS, Coverage(128, trips=7)) == 12


def test_an_unrolled_loop_shows_as_too_many_bytes() -> None:
    assert bytes_per_element(program(loop(LOAD_X * 2) + f"{LOAD_X} ret;"), ELEMENTS, Coverage(128, trips=5)) > 8


def test_a_loop_in_a_loop_cannot_be_read() -> None:
    outer = loop(loop(LOAD_X).replace("BB0_1", "BB0_3").replace("BB0_2", "BB0_4"))
    with pytest.raises(Unreadable, match="within a loop"):
        bytes_per_element(program(f"{outer} ret;"), ELEMENTS, TILE)


def test_loops_in_loops_may_lie_beside_the_elements() -> None:
    """Here the inner loop leaves for the head of the outer one."""
    code = program(f"""
        {LOAD_X}
    $L__BB0_1:
        add.s32 %r30, %r30, 1;
    $L__BB0_2:
        @%p1 bra $L__BB0_1;
        @%p2 bra $L__BB0_2;
        ret;""")
    assert sorted(sorted(loop.body) for loop in find_loops(code.successors)) == [[1, 2, 3], [2, 3]]
    assert bytes_per_element(code, ELEMENTS, TILE) == 4


def test_a_loop_with_two_entries_cannot_be_read() -> None:
    body = f"@%p1 bra $L__BB0_2; $L__BB0_1: {LOAD_X} $L__BB0_2: {STORE_Y} @%p2 bra $L__BB0_1; ret;"
    with pytest.raises(Unreadable, match="two entries"):
        bytes_per_element(program(body), ELEMENTS, TILE)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("call.uni (%r1), f, (%r2);", "call.uni"),
        ("cp.async.bulk.shared::cluster.global [%r1], [%rd3], 16, [%r2];", "cp.async.bulk"),
        ("ld.shared.b64 %rd6, [%r1]; ld.global.b32 %r2, [%rd6];", "shared memory"),
        ("ld.global.matrix %r2, [%rd3];", "width"),
    ],
)
def test_what_the_analysis_does_not_know_is_said(body: str, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        program(f"{body} ret;")


def test_threads_without_elements_of_their_own_move_none() -> None:
    """A tile of 32 elements in a program of 64 threads: half of them load what the other half loads."""
    code = program("ld.global.b32 {%r1}, [%rd3]; ret;", threads="32, 2, 1")
    assert bytes_per_element(code, ELEMENTS, Coverage(32)) == 4
    assert bytes_per_element(code, ELEMENTS, Coverage(64)) == 4


def test_asynchronous_copies_and_atomics_move_elements() -> None:
    code = program("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd3 + 0 ], 0x10, 0x10; ret;")
    assert narrowest(code, ELEMENTS, store=False) == 128
    assert bytes_per_element(code, ELEMENTS, TILE) == 4
    code = program("atom.global.gpu.acq_rel.add.u32 %r1, [%rd4], %r2; ret;")
    assert narrowest(code, ELEMENTS, store=False) == narrowest(code, ELEMENTS, store=True) == 32


@pytest.mark.parametrize("registers", [24, 255])
def test_registers_and_spills(registers: int, tmp_path: Path) -> None:
    """64 numbers are loaded before the first is used: 24 registers cannot hold them."""
    numbers = range(64)
    (tmp_path / "k.ptx").write_text(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p)\n"
        f".reqntid 32\n.maxnreg {registers}\n{{\n.reg .b32 %r<64>;\n.reg .b64 %rd<1>;\nld.param.u64 %rd0, [p];\n"
        + "".join(f"ld.volatile.global.b32 %r{n}, [%rd0+{4 * n}];\n" for n in numbers)
        + "".join(f"st.volatile.global.b32 [%rd0+{4 * n}], %r{n};\n" for n in numbers)
        + "ret;\n}\n"
    )
    command = [triton.knobs.nvidia.ptxas.path, "--gpu-name=sm_80", "k.ptx", "-o", "k.cubin"]
    subprocess.run(command, cwd=tmp_path, check=True)
    used = resources((tmp_path / "k.cubin").read_bytes())
    assert used.registers <= registers
    assert (used.spilled > 0) == (registers == 24)
