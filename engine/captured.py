"""Steps of mode ``clean`` recorded once as CUDA graphs and replayed: a step costs the host one launch.

All trajectories of one batch size share their tensors. A step reads latents, targets and who is alive from buffers and
leaves the next ones there, so that steps of one kind are the same launches on the same tensors; which row of the table
is theirs they count on the device. Recording happens at a kind's first step, after one that warms up.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffdfkd.engine.cutmix import CutMixPlan
from diffdfkd.engine.guidance_schedule import GuidanceSchedule
from diffdfkd.engine.loop import Alone, Kind, Loop, open_lanes, step_chains, step_kinds, step_widths
from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.sampler import Trajectory, travel
from diffdfkd.engine.schedule import Table
from diffdfkd.engine.stages import Chain, UNet
from diffdfkd.kernels.advance import Advance
from diffdfkd.kernels.launch import Kernel
from diffdfkd.kernels.row import start_counter
from diffdfkd.kernels.step_inputs import Draw, Mix

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""What makes a replay of a body; the body may run once while it does."""


class CapturedSampler:
    """`engine.sampler.sample` for one UNet, chain and batch size B in mode ``clean``, or unguided without a chain."""

    def __init__(
        self,
        unet: UNet,
        table: Table,
        *,
        scale: float,
        shape: tuple[int, int, int, int],
        context: tuple[int, int, int],
        classes: int,
        seed: int,
        guidance: GuidanceRecipe,
        chain: Chain | None,
        kernel: Kernel,
        device: torch.device,
        light: Chain | None = None,
        alone: Alone | None = None,
        record: Record | None = None,
    ) -> None:
        """``shape`` [B, c, h, w] of the latents, ``context`` [B or 2B, T, D]; others as `sample` takes them."""
        batch, steps = shape[0], table.steps
        self.table, self._record = table, record or record_graph
        self.chains = {False: chain, True: light}
        widths = step_widths(context[0] == 2 * batch, alone, steps)
        self.kinds = step_kinds(table, step_chains(guidance, steps, chain, light), widths, [True] * steps)
        self.rows, self.timesteps = table.rows.to(device), table.timesteps.to(device)
        self.z = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
        self.previous_x0 = torch.zeros_like(self.z)
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)
        self.target = torch.zeros(batch, classes, device=device)
        self.loss = torch.zeros(4, device=device)
        self.frozen = torch.zeros(steps, dtype=torch.int32, device=device)
        self.step = start_counter(device)
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.partners = torch.zeros(steps, batch, dtype=torch.int64, device=device)
        self.boxes = torch.zeros(steps, batch, 4, dtype=torch.int32, device=device)
        held = torch.zeros(context, device=device)
        self.lanes = open_lanes(unet, None, alone, held, batch, shape[1:], self.timesteps)
        scales = torch.full((batch,), scale, dtype=torch.float32, device=device)
        draw = Draw(seed, self.ids)
        # Plans are checked where they are made.
        mixes = {False: None, True: Mix(self.partners, self.boxes, checked=True)}
        shared = (self.lanes, widths, self.rows, self.step, scales, draw)
        followed = (guidance, GuidanceSchedule.of(guidance, [kind.guided for kind in self.kinds], device))
        self.loops = {mixed: Loop(*shared, mix, self.frozen, *followed, kernel) for mixed, mix in mixes.items()}
        self.replays: dict[tuple[Kind, bool, bool], Callable[[], None]] = {}

    @torch.no_grad()
    def __call__(self, context: Tensor, noise: Tensor, sample_ids: Tensor, plan: CutMixPlan) -> Trajectory:
        """As `sample`; what is returned is the caller's."""
        table, device = self.table, self.z.device
        plan, prompts = plan.to(device), context[-len(noise) :].to(device)
        for lane in self.lanes.values():
            # Of both halves the prompt's is the last.
            lane.context.copy_(context[-len(lane.context) :])
        self.z.copy_(noise.float() * table.initial_scale)
        self.alive.fill_(True)
        self.frozen.zero_()
        self.step.zero_()
        self.loops[False].place(self.z, 0)
        state = Advance(self.z, self.previous_x0, self.alive)
        ended = travel(self._enter, self._step, state, plan, sample_ids.to(device), prompts, table.steps)
        return replace(ended, latents=ended.latents.clone(), frozen=ended.frozen.clone())

    def _enter(self, plan: CutMixPlan, sample_ids: Tensor) -> Loop:
        self.ids.copy_(sample_ids)
        mixed = any(plan.mixes)
        if mixed:
            self.partners.copy_(plan.partners)
            self.boxes.copy_(plan.boxes)
        return self.loops[mixed]

    def _step(self, index: int, loop: Loop, state: Advance, target: Tensor) -> tuple[Advance, Tensor | None]:
        own = Advance(self.z, self.previous_x0, self.alive)
        for buffer, value in zip(own, state, strict=True):
            # Of a step of its own it lies there already.
            if buffer is not None and value is not None and value is not buffer:
                buffer.copy_(value)
        kind = self.kinds[index]
        self.target.copy_(target)
        self._replay(kind, loop.mix is not None, self.table.looks_back[index])()
        return own, self.loss.clone() if kind.guided else None

    def _replay(self, kind: Kind, mixed: bool, looks_back: bool) -> Callable[[], None]:
        key = (kind, mixed, looks_back)
        if key not in self.replays:
            inputs = [tensor for lane in self.lanes.values() for tensor in lane.input[:2]]
            state = (self.z, self.previous_x0, self.alive, self.loss, self.frozen, self.step, *inputs)
            before = [tensor.clone() for tensor in state]
            self.replays[key] = self._record(lambda: self._body(kind, mixed, looks_back))
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        return self.replays[key]

    def _body(self, kind: Kind, mixed: bool, looks_back: bool) -> None:
        chain = self.chains[kind.light] if kind.guided else None
        previous = self.previous_x0 if looks_back else None
        (z, x0, alive), loss = self.loops[mixed].clean_step(kind, chain, self.z, previous, self.alive, self.target)
        self.z.copy_(z)
        self.alive.copy_(alive)
        if x0 is not None:
            self.previous_x0.copy_(x0)
        if loss is not None:
            self.loss.copy_(loss)


def record_graph(body: Callable[[], None]) -> Callable[[], None]:
    """Run the body once on a stream of its own, then record it; what is returned replays it on the current stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The thread that decodes may go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        body()
    # The graph reads tensors that the body holds.
    return _Replay(graph, body)


class _Replay:
    def __init__(self, graph: torch.cuda.CUDAGraph, body: Callable[[], None]) -> None:
        self._graph, self._body = graph, body

    def __call__(self) -> None:
        self._graph.replay()
