"""Teachers that come as a whole program, without their modules: ``exported`` (.pt2) and ``torchscript``.

They answer, and can be differentiated with respect to the image, but no BatchNorm layer in them can be read: L_bn
needs the input of each, and the program has no place to take it from.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.exported import DYNAMIC, read_exported
from diffdfkd.engine.torchscript import read_torchscript

READERS = {"exported": read_exported, "torchscript": read_torchscript}
"""Value of ``teacher.architecture`` -> reader of the file that ``teacher.weights`` names."""


class Program(nn.Module):
    """A program as a network; its state dict holds the file's SHA-256, since the weights alone do not identify it."""

    def __init__(self, network: nn.Module, sha256: bytes) -> None:
        super().__init__()
        self.network = network
        # A parameter, since a frozen program has no other that would tell which device it is on.
        self.digest = nn.Parameter(torch.tensor(list(sha256), dtype=torch.uint8), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        # A program may hold the strides that it was exported with.
        return self.network(images.contiguous())


def load_program(architecture: str, path: str | Path, channels: int, size: int, *, field: str) -> Program:
    """The program of a file, on the CPU, for images [B,channels,size,size] of any B; raises UserError otherwise."""
    where, path = f"{field}.weights", Path(path)
    if not path.is_file():
        raise UserError(f"{where}: {path}: no such file")
    program = Program(
        READERS[architecture](path, channels, size, where=where), hashlib.sha256(path.read_bytes()).digest()
    )
    program.eval().requires_grad_(False)
    before = [buffer.clone() for buffer in program.buffers()]
    answers = [_answer(program, batch, channels, size, where=f"{where}: {path}") for batch in (2, 1, 3, 3)]
    if not torch.equal(answers[-1], answers[-2]) or not all(map(torch.equal, before, program.buffers())):
        raise UserError(
            f"{where}: {path} changes its answers or its statistics from call to call, as in train mode; call "
            "model.eval() before it is exported"
        )
    return program


def _answer(program: Program, batch: int, channels: int, size: int, *, where: str) -> Tensor:
    """What the program says to the same few images at every call, moved by no BatchNorm or dropout in train mode."""
    images = torch.linspace(0, 1, batch * channels * size * size).reshape(batch, channels, size, size)
    try:
        with torch.no_grad():
            answer = program(images)
    except (RuntimeError, ValueError, TypeError) as error:
        problem = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"{where} fails on {batch} image(s) of {channels}x{size}x{size} "
            f"({problem[-1].strip() if problem else type(error).__name__}); set teacher.channels and teacher.size to "
            f"what it takes; if its batch is fixed, {DYNAMIC}, or trace it without sizes as numbers"
        ) from error
    if not isinstance(answer, Tensor):
        raise UserError(f"{where} gives {type(answer).__name__}, not logits; save a program that gives logits alone")
    if answer.shape[:1] != (batch,):
        raise UserError(
            f"{where} gives {list(answer.shape)} for {batch} image(s), so its batch is fixed; {DYNAMIC}, or trace it "
            "without sizes as numbers"
        )
    return answer
