import numpy as np
import pytest
import torch
from torch import Tensor

from diffdfkd.engine.batches import Batches, held_back
from diffdfkd.engine.errors import UserError


class Numbered:
    """Images whose pixels spell their index; counts what is read."""

    classes: list[str] | None = None

    def __init__(self, images: int) -> None:
        self.images, self.reads = images, 0

    def __len__(self) -> int:
        return self.images

    def read(self, indices: object) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        self.reads += len(chosen)
        digits = torch.stack([chosen % 256, chosen // 256], dim=1).to(torch.uint8)
        return digits[:, None, None, :].repeat(1, 1, 2, 1), chosen


def spelled(pixels: Tensor) -> Tensor:
    return pixels[:, 0, 0, 0].long() + 256 * pixels[:, 0, 0, 1].long()


@pytest.mark.parametrize("batch", [7, 40, 100])
def test_every_image_once_an_epoch_in_an_order_that_changes(batch: int) -> None:
    batches = Batches(Numbered(40), batch, seed=5)
    drawn = torch.cat([batches.indices(step) for step in range(41)])
    epochs = drawn[: len(drawn) // 40 * 40].view(-1, 40)
    assert all(torch.equal(epoch.sort().values, torch.arange(40)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_a_batch_hangs_on_seed_step_and_number_of_images_alone() -> None:
    forward, backward = Batches(Numbered(50), 8, seed=1), Batches(Numbered(50), 8, seed=1)
    there = [forward.indices(step) for step in range(20)]
    back = [backward.indices(step) for step in reversed(range(20))]
    assert all(torch.equal(a, b) for a, b in zip(there, reversed(back), strict=True))
    assert not torch.equal(there[0], Batches(Numbered(50), 8, seed=2).indices(0))


def test_ranks_share_the_global_batch() -> None:
    indices, whole = Batches(Numbered(50), 12, seed=1).read(9)
    parts = [Batches(Numbered(50), 12, seed=1, rank=rank, world_size=3).read(9) for rank in range(3)]
    assert torch.equal(indices, torch.cat([part for part, _ in parts])) and torch.equal(spelled(whole), indices)
    assert torch.equal(whole, torch.cat([part for _, part in parts]))
    with pytest.raises(UserError, match="multiple of 5"):
        Batches(Numbered(50), 12, seed=1, world_size=5)


def test_held_back_images_are_never_drawn_and_were_never_drawn_before() -> None:
    drawn: set[int] = set()
    for images in (60, 100, 300):  # a data set that grows round by round
        batches = Batches(Numbered(images), 16, seed=3, holdout=9)
        assert len(batches.held) == 9
        drawn |= set(torch.cat([batches.indices(step) for step in range(40)]).tolist())
        assert drawn.isdisjoint(batches.held.tolist())
        assert len(drawn | set(batches.held.tolist())) == images
    with pytest.raises(UserError, match=r"distillation\.holdout: got 20 of 20"):
        Batches(Numbered(20), 4, seed=0, holdout=20)


def test_the_hold_out_is_a_fair_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = sum(np.bincount(held_back(100, 10, seed), minlength=100) for seed in range(400))
    assert isinstance(counts, np.ndarray) and counts.min() > 15 and counts.max() < 70  # 40 expected, deviation 6
    whole = held_back(100, 10, 7)
    monkeypatch.setattr("diffdfkd.engine.batches.CHUNK", 13)
    assert np.array_equal(whole, held_back(100, 10, 7))


@pytest.mark.parametrize("held_in_memory", [0, 17, 1000])
def test_cache_changes_nothing_and_saves_reads(held_in_memory: int) -> None:
    images = Numbered(300)
    batches, order = (Batches(images, 64, seed=0, cache_bytes=held_in_memory * 4) for _ in range(2))
    for step, (indices, pixels) in enumerate(batches.stream(3, 15), 3):
        assert torch.equal(spelled(pixels), order.indices(step)) and torch.equal(indices, order.indices(step))
    if held_in_memory == 1000:
        assert images.reads < 300 + 64  # an image may come twice in a batch that spans two epochs


def test_images_of_two_sizes_are_refused() -> None:
    class Uneven(Numbered):
        def read(self, indices: object) -> tuple[Tensor, Tensor]:
            chosen = torch.as_tensor(indices)
            size = 4 if int(chosen[0]) < 10 else 6
            return torch.zeros(len(chosen), 1, size, size, dtype=torch.uint8), chosen

    batches = Batches(Uneven(20), 1, seed=0)
    with pytest.raises(UserError, match="one size"):
        for step in range(20):
            batches.read(step)


def drawn_by_weight(images: int, weights: Tensor, batch: int = 10, **options: int) -> Batches:
    batches = Batches(Numbered(images), batch, seed=5, **options)
    batches.weigh(weights)
    return batches


@pytest.mark.parametrize("holdout", [0, 9])
def test_equal_weights_draw_what_no_weights_draw(holdout: int) -> None:
    plain = Batches(Numbered(50), 8, seed=5, holdout=holdout)
    weights = torch.zeros(50, dtype=torch.float64)
    weights[plain.trained_on()] = 2**20
    weighted = drawn_by_weight(50, weights, 8, holdout=holdout)
    assert all(torch.equal(plain.indices(step), weighted.indices(step)) for step in range(20))


def test_an_image_comes_as_often_as_its_weight_says_and_a_dropped_one_never() -> None:
    generator = torch.Generator().manual_seed(2)
    weights = torch.randint(1, 4 * 2**20, (40,), generator=generator).double()
    weights[::4] = 0
    batches = drawn_by_weight(40, weights)
    epochs = torch.cat([batches.indices(step) for step in range(1200)]).view(-1, 30)  # of the 30 images above 0
    counts = torch.stack([torch.bincount(epoch, minlength=40) for epoch in epochs])
    expected = 30 * weights / weights.sum()
    assert ((counts - expected).abs() < 1).all() and not counts[:, ::4].any()
    # The mean over 400 epochs of a count that is rounded up or down at random: a deviation of at most 0.025.
    assert (counts.double().mean(0) - expected).abs().max() < 0.1
    assert not torch.equal(epochs[0].sort().values, epochs[0])


def test_the_draw_by_weight_has_no_state() -> None:
    weights = torch.arange(1, 41, dtype=torch.float64)
    forward, backward = drawn_by_weight(40, weights), drawn_by_weight(40, weights)
    there = [forward.indices(step) for step in range(20)]
    back = [backward.indices(step) for step in reversed(range(20))]
    assert all(torch.equal(a, b) for a, b in zip(there, reversed(back), strict=True))
    shares = [drawn_by_weight(40, weights, rank=rank, world_size=2).share(7) for rank in range(2)]
    assert torch.equal(there[7], torch.cat(shares))
    assert not torch.equal(there[0], drawn_by_weight(40, weights.flip(0)).indices(0))
