import pytest
import torch

from diffdfkd.kernels.box import box_from_area, box_mask, box_share, check_boxes


def test_mask_is_the_inside() -> None:
    boxes = torch.tensor([[1, 2, 3, 5], [0, 0, 4, 6], [2, 2, 2, 2]], dtype=torch.int32)
    mask = box_mask(boxes, 4, 6)
    expected = torch.zeros(3, 1, 4, 6, dtype=torch.bool)
    expected[0, 0, 1:3, 2:5] = True
    expected[1] = True
    assert torch.equal(mask, expected)
    assert torch.equal(mask.float().mean((1, 2, 3)).double(), box_share(boxes, 4, 6))


def test_box_has_the_wanted_area_where_the_border_does_not_clip() -> None:
    area = torch.tensor([0.25, 0.0, 1.0, 0.0625])
    boxes = box_from_area(area, torch.full((4, 2), 0.5), 8, 16)
    assert boxes.dtype == torch.int32
    torch.testing.assert_close(box_share(boxes, 8, 16).float(), area)
    assert boxes[0].tolist() == [2, 4, 6, 12]


def test_boxes_are_clipped_at_the_border() -> None:
    boxes = box_from_area(torch.tensor([0.25, 0.25]), torch.tensor([[0.0, 0.0], [0.999, 0.999]]), 8, 8)
    assert boxes.tolist() == [[0, 0, 2, 2], [5, 5, 8, 8]]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 7), (8, 8), (64, 48)])
def test_random_boxes_lie_in_the_latent(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    area, centre = torch.rand(500, generator=generator), torch.rand(500, 2, generator=generator)
    boxes = box_from_area(area, centre, height, width)
    check_boxes(boxes, torch.zeros(500, dtype=torch.int64), height, width)


@pytest.mark.parametrize("box", [[-1, 0, 2, 2], [0, 0, 9, 2], [0, 0, 2, 9], [3, 0, 2, 2]])
def test_boxes_outside_the_latent_are_refused(box: list[int]) -> None:
    with pytest.raises(ValueError, match="does not lie in the latent 8 x 8"):
        check_boxes(torch.tensor([[0, 0, 1, 1], box]), torch.tensor([1, 0]), 8, 8)


def test_partners_outside_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="in a batch of 2"):
        check_boxes(torch.zeros(2, 4), torch.tensor([1, 2]), 8, 8)
    with pytest.raises(ValueError, match="boxes: got shape"):
        check_boxes(torch.zeros(3, 4), torch.tensor([1, 0]), 8, 8)
