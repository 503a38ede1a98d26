"""DeepSpeed as distillation uses it: processes, configuration, engine, checkpoint files. Imported only when it trains.

What is worked around here: DeepSpeed compiles an operator for minutes whenever a process group begins, its ``bf16``
fails on BatchNorm's buffers, buffers differ between ranks, and its checkpoint reader runs any code in a file.
"""

import atexit
import copy
import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdfkd.engine.checkpoint import State, publish, read_trusting_nothing
from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.distillation_recipe import DistillationRecipe
from diffdfkd.engine.errors import UserError


@dataclass(frozen=True)
class Place:
    """This process among those that train."""

    rank: int
    processes: int
    device: torch.device


def deepspeed_config(recipe: DistillationRecipe, parameters: int, processes: int) -> dict[str, Any]:
    """DeepSpeed's configuration: ours with the recipe's own merged over it, which holds no key that we own."""
    bucket = min(parameters, 500_000_000)
    bucket += bucket % 2  # DeepSpeed wants it even
    ours: dict[str, Any] = {
        "train_batch_size": recipe.batch_size,
        "train_micro_batch_size_per_gpu": recipe.batch_size // processes,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's own default is 1
        "steps_per_print": 2**31,
        # DeepSpeed's buckets of 2 GB are made for models that have so much.
        "zero_optimization": {
            "stage": recipe.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
    }
    if recipe.dtype == "bfloat16":
        # `bf16` would cast the parameters but not BatchNorm's buffers, and fail.
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return _merged(ours, recipe.deepspeed)


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    result = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


@contextmanager
def training_processes(device: torch.device) -> Iterator[Place]:
    """DeepSpeed imported and silent, a process group, and this process's place in it.

    A group made here stays until the process ends, since DeepSpeed keeps references to it.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    local = int(os.environ.get("LOCAL_RANK", 0)) if launched else device.index or 0
    ours = {} if launched else {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(local)}
    if device.type == "cpu":
        ours["DS_ACCELERATOR"] = "cpu"
    with _environment(ours), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed")
        deepspeed = _deepspeed(device)
        level = deepspeed.utils.logger.level
        deepspeed.utils.logger.setLevel("ERROR")
        linear = torch.nn.functional.linear
        try:
            if device.type == "cuda":
                device = torch.device("cuda", local)
                torch.cuda.set_device(device)
            if not torch.distributed.is_initialized():
                backend = "nccl" if device.type == "cuda" else "gloo"
                if launched:
                    torch.distributed.init_process_group(backend)
                else:
                    store = torch.distributed.HashStore()  # no port to be free
                    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
                atexit.register(_leave)
            yield Place(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)
        finally:
            deepspeed.utils.logger.setLevel(level)
            # ZeRO 3 puts its own in for the whole process, with which no network could be exported afterwards.
            torch.nn.functional.linear = linear


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _deepspeed(device: torch.device) -> Any:
    try:
        import deepspeed
        import deepspeed.ops
    except ModuleNotFoundError as error:
        raise UserError(
            f"distillation: {error.name} is not installed; DeepSpeed comes with the package on Linux"
        ) from None
    # Otherwise every process group begins by compiling this operator, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = deepspeed.accelerator.get_accelerator().device_name()
    if accelerator != device.type:
        raise UserError(
            f"device: got {device.type}, but DeepSpeed was imported for {accelerator} before; use a new process, or "
            f"start with DS_ACCELERATOR={device.type}"
        )
    return deepspeed


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """The variables, where they are not set already, for the duration."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def build_engine(student: Classifier, recipe: DistillationRecipe, place: Place) -> Any:
    """A DeepSpeed engine over a copy of the student: ZeRO takes the parameters apart that it is given."""
    import deepspeed

    module = copy.deepcopy(student).requires_grad_(True).to(place.device)
    parameters = list(module.parameters())
    optimizer: torch.optim.Optimizer
    # An optimizer made by DeepSpeed from its configuration would be compiled first.
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    config = deepspeed_config(recipe, sum(parameter.numel() for parameter in parameters), place.processes)
    try:
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    except (
        ValueError,
        AssertionError,
        deepspeed.runtime.config.DeepSpeedConfigError,
        deepspeed.runtime.zero.utils.ZeRORuntimeException,
    ) as error:
        if not recipe.deepspeed:
            raise
        raise UserError(f"distillation.deepspeed: DeepSpeed refuses it: {' '.join(str(error).split())}") from error
    return engine


def mean_over_processes(value: Tensor, place: Place) -> float:
    if place.processes > 1:
        torch.distributed.all_reduce(value)
        value /= place.processes
    return float(value)


def from_first(value: Tensor, place: Place) -> Tensor:
    """The first process's value, on the CPU: what others computed may differ in a last bit on another machine."""
    if place.processes == 1:
        return value
    shared = value.to(place.device)
    torch.distributed.broadcast(shared, src=0)
    return shared.cpu()


def average_buffers(module: nn.Module, place: Place) -> None:
    """BatchNorm's running statistics, which each process gathers from its own images, made the same everywhere."""
    if place.processes == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            torch.distributed.all_reduce(buffer)
            buffer /= place.processes


def gathered_weights(engine: Any) -> dict[str, Tensor]:
    """The student's whole state on the CPU, gathered where ZeRO 3 has scattered it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(
        list(engine.module.parameters()), enabled=engine.zero_optimization_stage() == 3
    ):
        return {name: value.detach().to("cpu", copy=True) for name, value in engine.module.state_dict().items()}


def save(engine: Any, folder: Path, state: State, place: Place) -> None:
    """Write and publish a checkpoint; raises OSError where the disk does not take it, and the one before stays."""
    try:
        engine.save_checkpoint(str(folder), tag=state.tag(), save_latest=False)  # ends with a barrier
    except RuntimeError as error:
        # What torch's writer says, in C++, of a disk that is full.
        if not any(sign in str(error) for sign in ("inline_container", "PytorchStreamWriter")):
            raise
        raise OSError(errno.ENOSPC, "not written whole, as on a full disk", str(folder / state.tag())) from error
    if place.rank == 0:
        publish(folder, state)
    torch.distributed.barrier()


def load(engine: Any, folder: Path, state: State) -> None:
    """Weights, buffers and optimizer as they were saved. DeepSpeed's own reader would run any code in the files."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    types = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    engine.checkpoint_engine.load = partial(_read, types)
    path, _ = engine.load_checkpoint(str(folder), tag=state.tag())
    if path is None or engine.global_steps != state.step:
        raise UserError(
            f"{folder / state.tag()}: holds step {engine.global_steps}, not {state.step}; "
            f"delete {folder} to start afresh"
        )


def _read(types: list[Any], path: str, map_location: Any = None) -> Any:
    return read_trusting_nothing(path, types, map_location)
