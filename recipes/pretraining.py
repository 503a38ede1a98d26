"""The training loop of each part of the prior: seeded steps, decay, averaged weights, resumable checkpoints."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.progress import progress_bar

# (step's own generator) -> named losses, among them "loss", the one that is minimised
LossFunction = Callable[[torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Plan:
    """How one part is trained; `settings` are what a checkpoint must have been made with to be continued."""

    name: str
    steps: int
    learning_rate: float
    seed: int
    checkpoint: Path
    checkpoint_every: int
    settings: dict[str, str]
    average_decay: float = 0.999


@dataclass(frozen=True)
class Outcome:
    """`losses` are exponential averages over about the last 100 steps; `seconds` are summed over all resumes."""

    losses: dict[str, float]
    seconds: float


def pretrain(model: nn.Module, loss_of: LossFunction, plan: Plan) -> Outcome:
    """Train `model` in place and leave it with the exponential average of its weights, in eval mode.

    Every random number of a step comes from (seed, part, step), so a run that was killed and started again with the
    same plan ends with the same bits as one that was not, on the same machine and thread count.
    """
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    losses: dict[str, float] = {}
    first, seconds = 0, 0.0

    state = load_checkpoint(plan)
    if state is not None:
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        for name, value in state["average"].items():
            average[name].copy_(value)
        losses, first, seconds = state["losses"], state["step"], state["seconds"]

    model.train()
    started = time.perf_counter()
    bar = progress_bar(plan.steps, plan.name, unit="steps", shown=sys.stderr.isatty(), done=first)
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * learning_rate_factor(step, plan.steps)
        terms = loss_of(step_generator(plan.seed, plan.name, step))
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        decay = min(plan.average_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
        for name, term in terms.items():
            losses[name] = losses.get(name, term.item()) * 0.99 + term.item() * 0.01
        if not np.isfinite(losses["loss"]):
            raise UserError(
                f"--learning-rate: the loss of {plan.name} is not finite at step {step}; lower the learning rate"
            )
        done = step + 1
        if done % 100 == 0 or done == plan.steps:
            rate = (done - first) / (time.perf_counter() - started)
            shown = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
            tqdm.write(f"{plan.name} step {done}/{plan.steps} {shown} ({rate:.1f} steps/s)")
        if done % plan.checkpoint_every == 0 or done == plan.steps:
            save_checkpoint(
                plan,
                {
                    "settings": plan.settings,
                    "step": done,
                    "seconds": seconds + time.perf_counter() - started,
                    "losses": losses,
                    "model": {name: parameter.detach() for name, parameter in parameters.items()},
                    "average": average,
                    "optimizer": optimizer.state_dict(),
                },
            )
        bar.update()
    bar.close()
    seconds += time.perf_counter() - started if first < plan.steps else 0.0
    model.load_state_dict(average, strict=False)
    model.eval()
    return Outcome(losses, seconds)


def place(module: nn.Module, device: torch.device) -> None:
    """Move in place; channels last, which halves the cost of a convolution on a CPU."""
    module.to(device).to(memory_format=torch.channels_last)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 2 % of the steps, constant, linear decay to 2 % of the rate over the last 40 %."""
    warm = min(1.0, (step + 1) / max(1, 0.02 * steps))
    decay = min(1.0, max(0.02, (steps - step) / max(1, 0.4 * steps)))
    return warm * decay


def step_generator(seed: int, part: str, step: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    words = np.random.SeedSequence([seed, step, *part.encode()]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def save_checkpoint(plan: Plan, state: dict[str, Any]) -> None:
    """Write under a temporary name and rename, so that a kill leaves the previous checkpoint whole."""
    plan.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    temporary = plan.checkpoint.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, plan.checkpoint)


def load_checkpoint(plan: Plan) -> dict[str, Any] | None:
    """The last checkpoint, or None; UserError where it was made with other settings."""
    if not plan.checkpoint.is_file():
        return None
    state: dict[str, Any] = torch.load(plan.checkpoint, weights_only=True, map_location="cpu")
    for name, value in plan.settings.items():
        found = state["settings"].get(name)
        if found != value:
            raise UserError(
                f"{plan.checkpoint}: was made with {name} {found}, this run has {value}; "
                "restore that, or give another --checkpoints folder to start anew"
            )
    return state
