"""The stage itself, operator by operator, in a precision of choice."""

import torch
from torch import Tensor

from diffdfkd.engine.engine_stages import Stage
from diffdfkd.engine.runner import Runner


class EagerRunner(Runner):
    """A stage's function as it is; outputs are made anew with each call."""

    engine = "eager"

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.specification, stage.device)
        self._function = stage.function

    @torch.no_grad()
    def run(self, rows: int) -> tuple[Tensor, ...]:
        return tuple(self._function(*self.views(rows)))
