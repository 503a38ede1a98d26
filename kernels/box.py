"""Boxes of latent CutMix: integer rectangles (top, left, bottom, right) in latent pixels, bottom and right exclusive.

Geometry of CutMix (Yun et al., ICCV 2019, eq. 2), rounded to the latent's pixels and clipped at its border.
"""

import torch
from torch import Tensor


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Inside of the boxes [B, 4] as bool [B, 1, height, width]."""
    top, left, bottom, right = boxes[:, :, None].unbind(1)  # each [B, 1]
    row = torch.arange(height, device=boxes.device)[None]
    column = torch.arange(width, device=boxes.device)[None]
    rows = (row >= top) & (row < bottom)  # [B, height]
    columns = (column >= left) & (column < right)  # [B, width]
    return rows[:, None, :, None] & columns[:, None, None, :]


def box_from_area(area: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """Boxes int32 [B, 4] of the wanted share of the area [B] around centres [B, 2] (y, x), all in [0, 1].

    The border clips a box, so that its share may be smaller: read the true one from `box_share`.
    """
    side = area.double().clamp(0, 1).sqrt()[:, None]  # [B, 1]
    size = torch.tensor([[height, width]], device=area.device)  # [1, 2]
    extent = torch.round(side * size).long()  # [B, 2]
    middle = (centre.double() * size).floor().long().clamp(max=size - 1)
    first = middle - extent // 2
    last = first + extent
    zero = torch.zeros_like(size)
    return torch.cat((first.clamp(zero, size), last.clamp(zero, size)), dim=1).int()


def box_share(boxes: Tensor, height: int, width: int) -> Tensor:
    """Share of the area that the boxes [B, 4] cover, float64 [B]."""
    top, left, bottom, right = boxes.long().unbind(1)
    return ((bottom - top) * (right - left)).double() / (height * width)


def check_boxes(boxes: Tensor, partners: Tensor, height: int, width: int) -> None:
    """Raises ValueError for a box outside the latent or a partner outside the batch; boxes [..., B, 4], partners
    [..., B].

    It reads values, so it belongs where a plan is made, never into the sampling loop.
    """
    if boxes.shape != (*partners.shape, 4):
        raise ValueError(f"boxes: got shape {tuple(boxes.shape)} for partners {tuple(partners.shape)}")
    batch = partners.shape[-1]
    if partners.numel() and not 0 <= int(partners.min()) <= int(partners.max()) < batch:
        raise ValueError(f"partners: indices {int(partners.min())}..{int(partners.max())} in a batch of {batch}")
    top, left, bottom, right = boxes.unbind(-1)
    inside = (top >= 0) & (top <= bottom) & (bottom <= height) & (left >= 0) & (left <= right) & (right <= width)
    if not bool(inside.all()):
        worst = boxes[~inside][0].tolist()
        raise ValueError(f"boxes: {worst} (top, left, bottom, right) does not lie in the latent {height} x {width}")


def seam_band(boxes: Tensor, band: int, height: int, width: int) -> Tensor:
    """Pixels within ``band`` of the seams of the boxes [B, 4], on either side, as bool [B, 1, height, width].

    A side that lies on the latent's border is no seam, and an empty box has none.
    """
    top, left, bottom, right = boxes.unbind(1)
    outer = torch.stack((top - band, left - band, bottom + band, right + band), 1)
    inner = torch.stack(
        (
            torch.where(top > 0, top + band, top),
            torch.where(left > 0, left + band, left),
            torch.where(bottom < height, bottom - band, bottom),
            torch.where(right < width, right - band, right),
        ),
        1,
    )
    empty = ((bottom <= top) | (right <= left))[:, None, None, None]
    return box_mask(outer, height, width) & ~box_mask(inner, height, width) & ~empty
