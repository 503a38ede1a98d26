"""What one process of a command takes of the machine: its device, its threads, its place in a launch of several."""

import logging
import os
from typing import Literal

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe

log = logging.getLogger(__name__)


def settle_machine(recipe: Recipe, before: Recipe | None = None) -> Recipe:
    """The recipe with device, threads and kernel chosen: as the run began, if it has, or else by what there is.

    Engines are as the run began; where none has, they are left to `recipes/engines.py`, which needs the networks.
    """
    device = recipe.device if recipe.device != "auto" else before.device if before else _device()
    if device == "cuda" and _device() != "cuda":
        place = ", in another output folder" if before is not None else ""
        raise UserError(
            "device: cuda is asked for, but torch finds no usable GPU (`diffdfkd doctor` says what it finds); give "
            f"device=cpu{place}"
        )
    threads = recipe.threads or (before.threads if before else None) or machine_threads()
    kernel = before.kernel if recipe.kernel == "auto" and before else recipe.kernel
    if kernel != "reference":
        kernel = _kernel(device, kernel, begun=before is not None and before.kernel == "triton")
    engine = recipe.engine
    if before is not None:
        began = {
            stage: getattr(before.engine, stage)
            for stage in ("unet", "chain", "attention")
            if getattr(engine, stage) == "auto"
        }
        engine = engine.model_copy(update=began)
    return recipe.model_copy(update={"device": device, "threads": threads, "kernel": kernel, "engine": engine})


def rank() -> int:
    """Of this process among those of a torchrun or DeepSpeed launch."""
    return int(os.environ.get("RANK", "0"))


def launched() -> bool:
    """Whether this is one of several processes of a torchrun or DeepSpeed launch."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def refuse_launch(command: str) -> None:
    """UserError where several processes were launched, of which each would make all images."""
    if launched():
        raise UserError(
            f"{command}: synthesis is one process; launch `diffdfkd distill` alone with torchrun, not {command}"
        )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _kernel(device: str, wanted: Literal["auto", "triton"], *, begun: bool) -> Literal["triton", "reference"]:
    """The form that is meant on a device; UserError where there is none. ``begun``: the folder's run took Triton."""
    if wanted == "auto" and device != "cuda":
        return "reference"
    import torch

    from diffdfkd.kernels.launch import KernelUnavailable, launch_fault, settle_kernel

    try:
        settled = settle_kernel(wanted, torch.device(device))
    except KernelUnavailable as error:
        if begun:
            raise UserError(
                f"kernel: the run in this folder took triton, which needs a CUDA device, and this is the {device}; go "
                "on with it on a GPU, or give kernel=reference and another output folder"
            ) from None
        raise UserError(str(error)) from None
    if settled == "triton" and device == "cuda" and (fault := launch_fault()) is not None:
        if wanted == "triton":
            raise UserError(f"kernel: {fault}; or give kernel=reference{', in another output folder' * begun}")
        log.warning("kernel=auto takes kernel=reference (plain torch): %s", fault)
        return "reference"
    return settled


def machine_threads() -> int:
    """CPU threads that one process may take: the cores, shared out among the processes of a launch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Of the processes on this machine torchrun gives the first, the DeepSpeed launcher the second.
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return max(1, cores // int(processes))
