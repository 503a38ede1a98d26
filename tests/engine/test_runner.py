import pytest
import torch
from torch import Tensor

from diffdfkd.engine.runner import Runner
from diffdfkd.engine.specification import Port, Specification

F32 = torch.float32
INPUTS = (Port("sample", (4, 2), F32), Port("alive", (4,), torch.bool), Port("weight", (2,), F32, batched=False))
OUTPUTS = (Port("product", (4, 2), F32), Port("flags", (4,), torch.bool), Port("count", (), F32, batched=False))


class Plain(Runner):
    """Multiplies on its buffers; records how many rows it ran and what stood in the buffers then."""

    engine = "plain"

    def __init__(self, specification: Specification) -> None:
        super().__init__(specification, torch.device("cpu"))
        self.ran: list[int] = []
        self.seen: list[Tensor] = []

    def run(self, rows: int) -> tuple[Tensor, ...]:
        self.ran.append(rows)
        sample, alive, weight = self.views(rows)
        self.seen.append(sample.clone())
        return sample * weight + 1, ~alive, alive.sum().float()


def runner(least: int | None = None, most: int | None = None) -> Plain:
    return Plain(Specification("stage", INPUTS, OUTPUTS, least, most))


def call(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.arange(1.0, 2 * rows + 1).reshape(rows, 2),
        torch.ones(rows, dtype=torch.bool),
        torch.tensor([2.0, 3.0]),
    )


def check(outputs: tuple[Tensor, ...], rows: int) -> None:
    sample, alive, weight = call(rows)
    product, flags, count = outputs
    assert torch.equal(product, sample * weight + 1)
    assert torch.equal(flags, ~alive)
    assert count.shape == () and count == rows


def test_buffers_are_its_own_and_as_large_as_the_largest_batch() -> None:
    plain = runner(1, 6)
    assert {name: tuple(buffer.shape) for name, buffer in plain.inputs.items()} == {
        "sample": (6, 2),
        "alive": (6,),
        "weight": (2,),
    }
    assert [buffer.dtype for buffer in plain.inputs.values()] == [F32, torch.bool, F32]
    given = call(6)
    check(plain(*given), 6)
    given[0].zero_()
    assert plain.inputs["sample"].all()
    check(plain(*call(6)), 6)


def test_views_are_the_first_rows_of_the_buffers() -> None:
    plain = runner(1, 6)
    for view, port in zip(plain.views(3), INPUTS, strict=True):
        assert view.shape == port.shape_at(3)
        assert view.data_ptr() == plain.inputs[port.name].data_ptr()
    with pytest.raises(ValueError, match="7 rows is more than this engine was built for, 6"):
        plain.views(7)


def test_own_views_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = runner(1, 6)
    given = call(3)
    for view, value in zip(plain.views(3), given, strict=True):
        view.copy_(value)

    def refuse(this: Tensor, *_: object) -> Tensor:
        raise AssertionError("copied")

    monkeypatch.setattr(Tensor, "copy_", refuse)
    check(plain(*plain.views(3)), 3)
    # One that merely begins at the same place is.
    turned = plain.inputs["sample"][:2].t()
    with pytest.raises(AssertionError, match="copied"):
        plain(turned, *plain.views(2)[1:])


def test_inputs_of_any_layout_and_with_a_graph() -> None:
    plain = runner()
    sample, alive, weight = call(4)
    check(plain(sample.t().contiguous().t().requires_grad_(), alive, weight.requires_grad_()), 4)
    assert not any(buffer.requires_grad for buffer in plain.inputs.values())


def test_short_batch_is_padded_with_zeros_and_its_rows_alone_returned() -> None:
    plain = runner()
    plain(*call(4))
    outputs = plain(*call(3))
    check(outputs, 3)
    assert plain.ran == [4, 4]
    assert not plain.seen[1][3:].any()
    assert not plain.inputs["alive"][3:].any()  # so that they count nowhere
    assert outputs[2] == 3


def test_batches_of_a_range_are_run_as_they_are() -> None:
    plain = runner(2, 6)
    for rows in (6, 2, 5, 1):
        check(plain(*call(rows)), rows)
    assert plain.ran == [6, 2, 5, 2]


def test_padding_leaves_later_rows_alone() -> None:
    plain = runner(2, 6)
    plain(*call(6))
    plain(*call(1))
    assert not plain.inputs["sample"][1].any() and plain.inputs["sample"][2:].all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (call(5), "5 rows is more"),
        (call(4)[:2], "got 2 inputs; it takes sample, alive, weight"),
        ((call(4)[0].double(), *call(4)[1:]), "sample is torch.float64"),
        ((*call(4)[:2], torch.ones(3)), "weight is"),
    ],
)
def test_call_that_does_not_fit_leaves_the_buffers_alone(given: tuple[Tensor, ...], said: str) -> None:
    plain = runner()
    with pytest.raises(ValueError, match=said):
        plain(*given)
    assert not any(buffer.any() for buffer in plain.inputs.values()) and not plain.ran


def test_outputs_hold_no_graph_and_close_may_be_called_twice() -> None:
    plain = runner()
    sample, alive, weight = call(4)
    assert not any(output.requires_grad for output in plain(sample.requires_grad_(), alive, weight))
    plain.close()
    plain.close()
