"""Which implementation of attention a UNet in torch uses: torch's own, or xformers' where it works and is wanted."""

import logging
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.onnx_files import deepest_line, silent

Attention = Literal["sdpa", "xformers"]
GAIN = 1.03
"""How much faster xformers must be to be taken: less is noise."""
REPETITIONS = 5

log = logging.getLogger(__name__)


def settle_attention(
    wanted: Literal["auto", "sdpa", "xformers"], engine: str, unet: nn.Module, call: Callable[[], Any]
) -> Attention:
    """The implementation to use where ``engine`` runs the UNet; ``call`` runs it once, as the run does.

    ``auto`` takes xformers only on CUDA, and only where it is installed, works and is faster in a short trial.
    Raises UserError where xformers is asked for and cannot be had. Leaves torch's own set.
    """
    if wanted == "sdpa":
        return "sdpa"
    fault = _fault(engine, unet)
    tried = fault is None
    if fault is None:
        try:
            use_attention(unet, "xformers")
            call()
        # xformers, diffusers and CUDA have errors of their own for each thing that can be wrong.
        except Exception as error:
            fault = f"it does not work here ({deepest_line(error)})"
        finally:
            use_attention(unet, "sdpa")
    if fault is not None:
        if wanted == "xformers":
            raise _refusal(fault)
        # That it is not there is as most machines are; that it is there and fails is for the user to know.
        log.log(logging.WARNING if tried else logging.INFO, "engine.attention=auto takes sdpa: xformers: %s", fault)
        return "sdpa"
    if wanted == "xformers":
        return "xformers"
    seconds = _seconds(unet, call)
    log.info("engine.attention=auto: %s", seconds)
    return "xformers" if seconds["sdpa"] > GAIN * seconds["xformers"] else "sdpa"


def refuse_attention(wanted: str, engine: str, unet: nn.Module) -> None:
    """UserError where xformers is asked for and out of the question, before an engine is looked for."""
    if wanted == "xformers" and (fault := _fault(engine, unet)) is not None:
        raise _refusal(fault)


def _refusal(fault: str) -> UserError:
    return UserError(f"engine.attention: xformers cannot be had: {fault}; give engine.attention=sdpa")


def use_attention(unet: Any, attention: str) -> None:
    """Set a UNet's attention processors; anything but ``xformers`` is torch's own, with which it was loaded."""
    if attention == "xformers":
        with silent():
            unet.enable_xformers_memory_efficient_attention()
    elif any("xformers" in type(processor).__name__.lower() for processor in unet.attn_processors.values()):
        from diffusers.models.attention_processor import AttnProcessor2_0

        # Not diffusers' default, which is the plain one.
        unet.set_attn_processor(AttnProcessor2_0())


def _fault(engine: str, unet: nn.Module) -> str | None:
    """Why xformers is out of the question, before anything is tried."""
    device = next(unet.parameters()).device
    if engine not in ("auto", "eager"):
        return f"engine.unet={engine} has an attention of its own"
    if device.type != "cuda":
        return f"it needs a CUDA device, and this is the {device.type}"
    if find_spec("xformers") is None:
        return 'it is not installed; pip install "diffdfkd[xformers]"'
    return None


def _seconds(unet: nn.Module, call: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of a call with each, interleaved, after one that warms up."""
    spent: dict[str, list[float]] = {"sdpa": [], "xformers": []}
    for repetition in range(REPETITIONS + 1):
        for attention, times in spent.items():
            use_attention(unet, attention)
            torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if repetition:
                times.append(time.perf_counter() - started)
    use_attention(unet, "sdpa")
    return {attention: statistics.median(times) for attention, times in spent.items()}
