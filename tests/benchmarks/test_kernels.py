"""The benchmark of the kernels, as far as it goes without a GPU: what it compares, and that it claims no time."""

import json
from pathlib import Path

import pytest
import torch

from diffdfkd.benchmarks import kernels
from diffdfkd.benchmarks.kernels import Operation, error_of, main, measure, operations

CPU = torch.device("cpu")


def test_without_a_gpu_the_references_alone_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    file = tmp_path / "rows.json"
    assert main(["--only", "kd_loss", "--repetitions", "2", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert {row["form"] for row in content["rows"]} == {"reference", "compiled"}
    assert all(row["gigabytes_per_second"] is None for row in content["rows"])
    assert content["conditions"]["gpu"] is None and content["conditions"]["versions"]["torch"]
    assert "the Triton kernels cannot be timed here" in capsys.readouterr().out


@pytest.mark.parametrize("which", [operation for operation, _, _ in operations(CPU)][:7])
def test_forms_give_the_same_result(which: str) -> None:
    """Under the interpreter, on the operations as the benchmark makes them; large ones are left to the GPU's run."""
    torch.manual_seed(0)
    small = [what for name, configuration, what in operations(CPU) if name == which and "[100, 4" in configuration]
    if not small:
        pytest.skip("too large for the interpreter")
    (operation,) = small
    expected = [tensor.clone() for tensor in kernels.checked(operation, lambda: operation.call("reference"))]
    assert error_of(kernels.checked(operation, lambda: operation.call("triton")), expected) < 1e-5


def test_operations_and_bytes_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--count", "--only", "predict"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[1].split()[:1] == ["predict"]
    with kernels.Counting() as counting:
        tensor = torch.ones(4, device="meta")
        (tensor.view(2, 2) + 1).sum()
    # ones, the sum with 1, and its total: 16, 16 + 16 and 16 + 4 bytes.
    assert (counting.operations, counting.bytes) == (3, 16 + 32 + 20)


def test_a_wrong_form_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = torch.zeros(3)
    calls = {"reference": torch.ones(3), "compiled": torch.tensor([1.0, torch.nan, 1.0])}

    def call(form: str) -> tuple[torch.Tensor, torch.Tensor]:
        if form == "reference":
            buffer.copy_(torch.ones(3))
        return calls[form], buffer

    operation = Operation(call, 12, [buffer])
    monkeypatch.setattr(kernels, "forms_of", lambda *_: {form: lambda form=form: call(form) for form in calls})
    rows = {row.form: row for row in measure("op", "here", operation, CPU, 2)}
    assert rows["reference"].error == 0 and rows["reference"].microseconds is not None
    assert rows["compiled"].microseconds is None and rows["compiled"].note == "WRONG: not timed"
    # A buffer that is not written shows as well.
    calls["compiled"] = torch.ones(3)
    rows = {row.form: row for row in measure("op", "here", operation, CPU, 2)}
    assert rows["compiled"].note == "WRONG: not timed"


def test_a_kernel_that_fails_leaves_the_other_forms_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> kernels.Outputs:
        raise RuntimeError("out of resources\nand more")

    operation = Operation(lambda form: (torch.ones(3),), 12)
    monkeypatch.setattr(kernels, "forms_of", lambda *_: {"triton": fail, "reference": lambda: operation.call("")})
    rows = {row.form: row for row in measure("op", "here", operation, CPU, 2)}
    assert rows["triton"].microseconds is None and rows["triton"].note == "FAILS: RuntimeError: out of resources"
    assert rows["reference"].microseconds is not None and set(rows) == {"triton", "reference"}


def test_what_was_measured_stays_when_the_next_operation_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = kernels.Timing("advance", "here", "triton", 1.0, None, None, "WRONG: not timed")
    measured = iter([[row]])  # and then nothing more
    monkeypatch.setattr(kernels, "measure", lambda *_: next(measured))
    file = tmp_path / "rows.json"
    with pytest.raises(StopIteration):
        main(["--only", "advance", "--json", str(file)])
    assert [row["operation"] for row in json.loads(file.read_text())["rows"]] == ["advance"]
    monkeypatch.setattr(kernels, "measure", lambda *_: [row])
    assert main(["--only", "advance"]) == 1


def test_the_host_is_given_time_to_get_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device sleeps twice as long until the whole call is enqueued before it begins."""
    slept: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return slept[-1] < 3 * kernels.AHEAD

        def elapsed_time(self, end: "Event") -> float:
            return 2.0

    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert kernels._time(lambda: None, torch.device("cuda")) == 0.002
    assert slept == [kernels.AHEAD, 2 * kernels.AHEAD, 4 * kernels.AHEAD]


def test_mistakes_cost_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--repetitions", "0"], "--repetitions: got 0"),
        (["--json", str(tmp_path / "none" / "rows.json")], "is no folder"),
        (["--only", "nothing"], "no operation's name contains 'nothing'"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().err
