"""What one sampling step takes besides latents and prediction: gradient, noise, CutMix, the UNet's input buffers."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdfkd.kernels.box import check_boxes
from diffdfkd.kernels.launch import check_tensor
from diffdfkd.kernels.memory_format import is_crossed
from diffdfkd.kernels.philox import check_seed
from diffdfkd.kernels.predict import Prediction
from diffdfkd.kernels.rho import RULES, Rule


class Guidance(NamedTuple):
    """A gradient with respect to x0, as the guidance chain returns it, and how far to follow it."""

    gradient: Tensor
    """[B, c, h, w] of any float dtype; not read where the step size is 0."""
    norm: Tensor
    """[B] float32, |gradient| of each sample."""
    finite: Tensor
    """[B] bool; a sample whose flag is false is frozen."""
    scale: Tensor
    """[B] float32, of classifier-free guidance."""
    rule: Rule
    rho: float


class Mix(NamedTuple):
    """Latent CutMix of all steps: `checked_mix`."""

    partners: Tensor
    """[S, B] int64, index in the batch."""
    boxes: Tensor
    """[S, B, 4] int32 (top, left, bottom, right), half open; empty: the sample is not mixed."""
    checked: bool = False
    """Whether partners and boxes are known to lie inside: else their values are looked at in each step."""


class Draw(NamedTuple):
    """Where the step's noise is drawn from (kernels/philox.py)."""

    seed: int
    sample_ids: Tensor
    """[B] int64."""


class NextInput(NamedTuple):
    """The UNet's own input buffers, written for the next step."""

    sample: Tensor
    """[B or 2B, c, h, w] of any float dtype."""
    timestep: Tensor
    """[B or 2B] float32."""
    timesteps: Tensor
    """[S] float32, of the table."""


def write_input(sample: Tensor, values: Tensor) -> None:
    """The UNet's input [B, c, h, w] into its buffer [B or 2B, c, h, w], once or twice over, in the buffer's dtype."""
    batch = len(values)
    sample.unflatten(0, (-1, batch)).copy_(values.expand(len(sample) // batch, *values.shape))


def checked_mix(partners: Tensor, boxes: Tensor, height: int, width: int, device: torch.device | str) -> Mix:
    """CutMix of S steps from partners int64 [S, B] and boxes int32 [S, B, 4], for latents of height x width.

    Raises ValueError for a box outside the latent or a partner outside the batch. It reads the values, which the step
    itself must not do: make it where the plan is made, before the loop.
    """
    check_boxes(boxes, partners, height, width)
    return Mix(partners.to(device, torch.int64).contiguous(), boxes.to(device, torch.int32).contiguous(), checked=True)


def check_step(
    z: Tensor,
    prediction: Prediction,
    previous_x0: Tensor | None,
    rows: Tensor,
    alive: Tensor,
    guidance: Guidance | None,
    noise: Tensor | Draw | None,
    mix: Mix | None,
    next_input: NextInput | None,
    frozen: Tensor | None,
) -> None:
    """Raises ValueError for the first tensor whose shape, dtype, device or strides do not fit."""
    batch, steps, latents = len(z), len(rows), tuple(z.shape)
    real = torch.float32
    check_prediction(prediction, z)
    if guidance is not None:
        check_guidance(guidance, z)
    expected: list[tuple[str, Any, tuple[int, ...], torch.dtype | None]] = [
        ("previous_x0", previous_x0, latents, None),
        ("alive", alive, (batch,), torch.bool),
        ("frozen", frozen, (steps,), torch.int32),
    ]
    if isinstance(noise, Draw):
        expected.append(("noise.sample_ids", noise.sample_ids, (batch,), torch.int64))
    else:
        expected.append(("noise", noise, latents, None))
    if mix is not None:
        expected += [
            ("mix.partners", mix.partners, (steps, batch), torch.int64),
            ("mix.boxes", mix.boxes, (steps, batch, 4), torch.int32),
        ]
    if next_input is not None:
        copies = 2 if len(next_input.sample) == 2 * batch else 1
        expected += [
            ("next_input.sample", next_input.sample, (copies * batch, *latents[1:]), None),
            ("next_input.timestep", next_input.timestep, (copies * batch,), real),
            ("next_input.timesteps", next_input.timesteps, (steps,), real),
        ]
    for name, tensor, shape, dtype in expected:
        check_tensor(name, tensor, shape, dtype, z.device, optional=name in ("previous_x0", "noise", "frozen"))
    if isinstance(noise, Draw):
        check_seed("noise.seed", noise.seed)
    if mix is not None and not mix.checked:
        check_boxes(mix.boxes, mix.partners, *latents[2:])
    if next_input is not None:
        read: dict[str, Tensor | None] = {
            "z": z,
            "prediction.x0": prediction.x0,
            "prediction.eps_hat": prediction.eps_hat,
        }
        read |= {"previous_x0": previous_x0, "noise": None if isinstance(noise, Draw) else noise}
        read["guidance.gradient"] = guidance.gradient if guidance is not None else None
        refuse_overlap("next_input.sample", next_input.sample, read)


def check_format(prediction: Prediction, z: Tensor) -> None:
    """Raises ValueError for a prediction that does not lie in the memory format of z."""
    for name in ("x0", "eps_hat"):
        if is_crossed(f"prediction.{name}", getattr(prediction, name), z):
            raise ValueError(f"prediction.{name}: not of the memory format of z; hand on what `predict` made from z")


def refuse_overlap(name: str, written: Tensor | None, read: Mapping[str, Tensor | None]) -> None:
    """Raises ValueError where a buffer that is written shares memory with a tensor that other programs still read."""
    if written is None or written.is_meta:
        return
    start, end = _span(written)
    for other, tensor in read.items():
        if tensor is None:
            continue
        first, last = _span(tensor)
        if first < end and start < last:
            raise ValueError(f"{name}: it shares memory with {other}; give it a buffer of its own")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last byte, exclusive, in memory."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def check_prediction(prediction: Prediction, z: Tensor) -> None:
    """Raises ValueError for a prediction that does not fit latents z."""
    check_tensor("prediction.x0", prediction.x0, tuple(z.shape), torch.float32, z.device)
    check_tensor("prediction.eps_hat", prediction.eps_hat, tuple(z.shape), torch.float32, z.device)
    tiles = prediction.squares.shape[-1] if prediction.squares.dim() == 3 else 1
    check_tensor("prediction.squares", prediction.squares, (2, len(z), tiles), torch.float32, z.device)


def check_guidance(guidance: Guidance, z: Tensor) -> None:
    """Raises ValueError for a gradient, or what comes with it, that does not fit latents z."""
    batch = (len(z),)
    check_tensor("guidance.gradient", guidance.gradient, tuple(z.shape), None, z.device)
    check_tensor("guidance.norm", guidance.norm, batch, torch.float32, z.device)
    check_tensor("guidance.finite", guidance.finite, batch, torch.bool, z.device)
    check_tensor("guidance.scale", guidance.scale, batch, torch.float32, z.device)
    if guidance.rule not in RULES:
        raise ValueError(f"guidance.rule: got {guidance.rule!r}; one of {', '.join(RULES)}")
    if not (isinstance(guidance.rho, float | int) and math.isfinite(guidance.rho) and guidance.rho >= 0):
        raise ValueError(f"guidance.rho: got {guidance.rho!r}; a finite number from 0 on expected")
