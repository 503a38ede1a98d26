"""A small stage with what a UNet has: convolutions, GroupNorm, SiLU and a linear layer of the time."""

from pathlib import Path

import torch
from torch import Tensor, nn

from diffdfkd.engine.onnx_files import OPSET, silent
from diffdfkd.engine.specification import Port, Specification

ROWS = 4


class SmallStage(nn.Module):
    """``latent`` [n, 4, 8, 8] and ``time`` [n] -> ``noise`` [n, 4, 8, 8]."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.time = nn.Linear(1, 8)
        self.leave = nn.Conv2d(8, 4, 3, padding=1)
        self.to(dtype).eval()

    def forward(self, latent: Tensor, time: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.norm(self.enter(latent)))
        return self.leave(hidden + self.time(time[:, None])[:, :, None, None])


def specify(
    dtype: torch.dtype = torch.float32, least: int | None = None, most: int | None = None, rows: int = ROWS
) -> Specification:
    latent, time = Port("latent", (rows, 4, 8, 8), dtype), Port("time", (rows,), dtype)
    return Specification("unet", (latent, time), (Port("noise", (rows, 4, 8, 8), dtype),), least, most)


def examples(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latent, time = torch.randn(rows, 4, 8, 8, generator=generator), torch.rand(rows, generator=generator)
    return latent.to(dtype), time.to(dtype)


def export(
    path: Path, dtype: torch.dtype = torch.float32, *, ranged: bool = False, weights_beside: bool = False
) -> Path:
    """As the exporter of stages writes it."""
    dynamic = ({0: torch.export.Dim("rows")},) * 2 if ranged else None
    with silent(), torch.no_grad():
        program = torch.onnx.export(
            SmallStage(dtype),
            examples(ROWS, dtype),
            dynamo=True,
            opset_version=OPSET,
            input_names=["latent", "time"],
            output_names=["noise"],
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=weights_beside)
    return path
