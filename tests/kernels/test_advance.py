from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from kernels_tolerances import DTYPES, NORMAL_TOLERANCE, TOLERANCES
from torch import Tensor
from vast import vast

from diffdfkd.kernels.advance import Advance, advance, advance_launch
from diffdfkd.kernels.philox import STEP_NOISE, philox_normal
from diffdfkd.kernels.predict import Prediction, sum_of_squares
from diffdfkd.kernels.row import COLUMNS, start_counter
from diffdfkd.kernels.step_inputs import Draw, Guidance, Mix, NextInput, checked_mix

KERNELS = ("reference", "triton")
Form = Literal["reference", "triton"]
SHAPES = [(1, 4, 8, 8), (3, 4, 5, 7), (4, 1, 1, 63), (2, 3, 1, 127), (1, 1, 1, 1), (2, 4, 17, 32)]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# Row 1 is the one that is meant and row 2 the next; the others would show.
STEP, STEPS = 1, 4
VALUES = {"z": 0.2, "x0": 0.7, "eps": 0.4, "previous": -0.3, "noise": 0.5, "x0_m": -1.6, "eps_m": 0.9}
ROWS = torch.full((STEPS, len(COLUMNS)), torch.nan)
ROWS[STEP] = torch.tensor([VALUES.get(name, 0.0) for name in COLUMNS])
ROWS[STEP + 1, COLUMNS.index("input_scale")] = 0.6
WITHOUT_Z = ROWS.clone()
WITHOUT_Z[STEP, COLUMNS.index("z")] = 0.0


def latents(shape: tuple[int, ...], n: int, format: str = "contiguous") -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).contiguous(memory_format=FORMATS[format]) for _ in range(n)]


def predicted(x0: Tensor, eps_hat: Tensor, guidance_norm: Tensor | float = 1.0) -> Prediction:
    squares = torch.as_tensor(guidance_norm).square().expand(len(x0))[:, None]
    return Prediction(x0, eps_hat, torch.stack([squares, sum_of_squares(x0)]))


def counter() -> Tensor:
    """As `predict` leaves it."""
    return start_counter("cpu", STEP)


def steering(gradient: Tensor, rule: Any = "raw", rho: float = 0.3, **others: Tensor) -> Guidance:
    batch = len(gradient)
    given: dict[str, Tensor] = {
        "norm": torch.linalg.vector_norm(gradient.float(), dim=(1, 2, 3)),
        "finite": torch.ones(batch, dtype=torch.bool),
        "scale": torch.full((batch,), 2.0),
        **others,
    }
    return Guidance(gradient, given["norm"], given["finite"], given["scale"], rule, rho)


def step_of(
    z: Tensor,
    eps_hat: Tensor,
    x0: Tensor,
    kernel: Form,
    *,
    previous: Tensor | None = None,
    alive: Tensor | None = None,
    rows: Tensor = ROWS,
    **options: Any,
) -> Advance:
    alive = torch.ones(len(z), dtype=torch.bool) if alive is None else alive
    options.setdefault("keep_x0", True)
    return advance(z, predicted(x0, eps_hat), previous, rows, counter(), alive, kernel=kernel, **options)


def mixing(partners: list[int], boxes: list[list[int]]) -> Mix:
    """At the step that is meant; at the others everything would be mixed."""
    batch = len(partners)
    all_partners = torch.arange(batch).flip(0).repeat(STEPS, 1)
    all_boxes = torch.tensor([0, 0, 1, 1], dtype=torch.int32).repeat(STEPS, batch, 1)
    all_partners[STEP], all_boxes[STEP] = torch.tensor(partners), torch.tensor(boxes)
    return checked_mix(all_partners, all_boxes, 1000, 1000, "cpu")


def buffers(shape: tuple[int, ...], dtype: torch.dtype, copies: int = 2, format: str = "contiguous") -> NextInput:
    sample = torch.full((copies * shape[0], *shape[1:]), torch.nan, dtype=dtype)
    timesteps = torch.tensor([999.0, 666.0, 333.0, 0.0])
    return NextInput(
        sample.contiguous(memory_format=FORMATS[format]), torch.full((copies * shape[0],), torch.nan), timesteps
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_row_is_applied(kernel: Form, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z, eps_hat, x0, previous, gradient, noise = latents(shape, 6)
    previous, gradient, noise = previous.to(dtype), gradient.to(dtype), noise.to(dtype)
    following = buffers(shape, dtype)
    result = step_of(
        z, eps_hat, x0, kernel, previous=previous, guidance=steering(gradient), noise=noise, next_input=following
    )
    guided = x0.double() - 0.3 * gradient.double()
    expected = 0.2 * z.double() + 0.7 * guided + 0.4 * eps_hat - 0.3 * previous.double() + 0.5 * noise.double()
    assert result.x0 is not None and result.alive.all()
    torch.testing.assert_close(result.x0.double(), guided, **TOLERANCES[torch.float32])
    torch.testing.assert_close(result.z.double(), expected, **TOLERANCES[torch.float32])
    torch.testing.assert_close(following.sample.double(), (0.6 * expected).repeat(2, 1, 1, 1), **TOLERANCES[dtype])
    assert following.timestep.tolist() == [333.0] * 2 * shape[0]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kernel", KERNELS)
def test_input_that_is_not_doubled_and_x0_that_is_not_kept(kernel: Form) -> None:
    z, eps_hat, x0 = latents((3, 4, 2, 2), 3)
    following = buffers((3, 4, 2, 2), torch.float32, copies=1)
    result = step_of(z, eps_hat, x0, kernel, next_input=following, keep_x0=False)
    torch.testing.assert_close(following.sample, 0.6 * result.z)
    assert result.x0 is None and following.timestep.tolist() == [333.0] * 3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_the_step_moves_on_and_the_last_one_reads_no_row_after_it(kernel: Form, step: int) -> None:
    z, eps_hat, x0 = latents((2, 1, 3, 3), 3)
    rows, following = torch.rand(STEPS, len(COLUMNS)), buffers((2, 1, 3, 3), torch.float32)
    now = torch.tensor([77, step], dtype=torch.int32)
    advance(
        z, predicted(x0, eps_hat), None, rows, now, torch.ones(2, dtype=torch.bool), next_input=following, kernel=kernel
    )
    assert now.tolist() == [step + 1, step]
    assert following.timestep[0] == following.timesteps[min(step + 1, STEPS - 1)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("z_format", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_formats_are_the_same(kernel: Form, z_format: str, other: str) -> None:
    shape = (3, 4, 5, 6)
    z, eps_hat, x0 = latents(shape, 3, z_format)
    _, _, _, previous, gradient, noise = latents(shape, 6, other)
    following, plain = buffers(shape, torch.float16, format=other), buffers(shape, torch.float16)
    mix = mixing([1, 2, 0], [[0, 0, 5, 3], [1, 2, 4, 6], [0, 0, 0, 0]])
    for explicit in (noise, Draw(3, torch.tensor([5, 2**41, 6]))):
        options = {"previous": previous, "guidance": steering(gradient), "noise": explicit, "mix": mix}
        result = step_of(z, eps_hat, x0, kernel, next_input=following, **options)
        expected = step_of(*latents(shape, 3), "reference", next_input=plain, **options)
        torch.testing.assert_close(result.z, expected.z, rtol=2e-5, atol=4e-6)
        torch.testing.assert_close(result.x0, expected.x0, **TOLERANCES[torch.float32])
        torch.testing.assert_close(following.sample, plain.sample, **TOLERANCES[torch.float16])
        assert result.z.stride() == z.stride()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (2, 4, 17, 32), (2, 1, 1, 63)])
@pytest.mark.parametrize("format", FORMATS)
def test_drawn_noise_is_that_of_seed_sample_and_step(kernel: Form, shape: tuple[int, ...], format: str) -> None:
    z, eps_hat, x0 = latents(shape, 3, format)
    ids, seed = torch.tensor([7, 2**41 + 3]), 2**63 + 5
    drawn = step_of(z, eps_hat, x0, kernel, noise=Draw(seed, ids)).z - step_of(z, eps_hat, x0, kernel).z
    expected = 0.5 * philox_normal(seed, ids, STEP, STEP_NOISE, shape[1:])
    torch.testing.assert_close(drawn, expected, **NORMAL_TOLERANCE)


@pytest.mark.parametrize("rows", [ROWS, WITHOUT_Z], ids=["z counts", "z does not"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_frozen_samples_keep_z_and_poison_nobody(kernel: Form, rows: Tensor) -> None:
    """Sample 1 was frozen before, sample 3 lost its x0, sample 4 its gradient; 2 wants a patch of a frozen one."""
    z, eps_hat, x0, gradient = latents((6, 4, 4, 4), 4)
    expected = step_of(z, eps_hat, x0, kernel, rows=rows, guidance=steering(gradient))
    dead = {1, 3, 4}
    for tensor in (eps_hat, x0, gradient):
        tensor[1] = torch.nan
    x0[3, 0, 0, 0] = torch.inf
    gradient[4] = torch.nan
    frozen = torch.zeros(STEPS, dtype=torch.int32)
    following = buffers(z.shape, torch.float32)
    result = step_of(
        z,
        eps_hat,
        x0,
        kernel,
        rows=rows,
        alive=torch.tensor([True, False, True, True, True, True]),
        guidance=steering(gradient, finite=torch.tensor([True, False, True, True, False, True])),
        mix=mixing(
            [0, 0, 1, 2, 5, 5], [[0, 0, 0, 0], [0, 0, 4, 4], [0, 0, 2, 2], [1, 1, 3, 3], [0, 0, 1, 1], [0, 0, 0, 0]]
        ),
        next_input=following,
        frozen=frozen,
    )
    for sample in dead:
        assert torch.equal(result.z[sample], z[sample])
    for sample in {0, 2, 5}:
        assert torch.equal(result.z[sample], expected.z[sample])
    assert result.alive.tolist() == [True, False, False, False, False, True]
    # Sample 1 was counted when it was frozen.
    assert frozen.tolist() == [0, 3, 0, 0]
    assert torch.isfinite(following.sample).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_empty_box_takes_nothing_from_a_frozen_partner(kernel: Form) -> None:
    z, eps_hat, x0 = latents((2, 1, 4, 4), 3)
    alive = torch.tensor([True, False])
    for box in ([2, 0, 2, 4], [0, 3, 4, 3], [3, 0, 1, 4]):
        boxes = torch.tensor(box, dtype=torch.int32).repeat(STEPS, 2, 1)
        mix = Mix(torch.ones(STEPS, 2, dtype=torch.int64), boxes, checked=True)
        assert step_of(z, eps_hat, x0, kernel, alive=alive, mix=mix).alive.tolist() == [True, False]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_size_of_zero_ignores_the_gradient(kernel: Form) -> None:
    z, eps_hat, x0 = latents((2, 4, 2, 2), 3)
    gradient = torch.full_like(z, torch.nan)
    result = step_of(z, eps_hat, x0, kernel, guidance=steering(gradient, norm=torch.zeros(2)))
    assert torch.equal(result.z, step_of(z, eps_hat, x0, kernel).z)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 4, 17, 32)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_cutmix_copies_the_partners_unmixed_result(kernel: Form, shape: tuple[int, ...]) -> None:
    """A ring 0 <- 1 <- 2 <- 0: each box holds what its partner would have been without CutMix."""
    height, width = shape[2:]
    z, eps_hat, x0, gradient, previous = latents(shape, 5)
    options: dict[str, Any] = {
        "noise": Draw(5, torch.arange(3)),
        "guidance": steering(gradient, "unit"),
        "previous": previous,
    }
    plain = step_of(z, eps_hat, x0, kernel, **options)
    following = buffers(shape, torch.float32)
    mix = mixing([1, 2, 0], [[0, 0, height, width], [1, 1, 3, 4], [0, 0, 0, 0]])
    mixed = step_of(z, eps_hat, x0, kernel, mix=mix, next_input=following, **options)
    for before, after in ((plain.z, mixed.z), (plain.x0, mixed.x0)):
        assert before is not None and after is not None
        assert torch.equal(after[0], before[1])
        expected = before[1].clone()
        expected[:, 1:3, 1:4] = before[2][:, 1:3, 1:4]
        assert torch.equal(after[1], expected)
        assert torch.equal(after[2], before[2])
    torch.testing.assert_close(following.sample, 0.6 * mixed.z.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rule", ["raw", "unit", "cfg"])
def test_each_sample_moves_by_its_own_step_size(kernel: Form, rule: Any) -> None:
    z, eps_hat, x0, gradient = latents((2, 4, 3, 3), 4)
    scale, guidance_norm = torch.tensor([2.0, 7.0]), torch.tensor([0.5, 1.0])
    prediction = predicted(x0, eps_hat, guidance_norm)
    alive = torch.ones(2, dtype=torch.bool)
    given = steering(gradient, rule, 0.1, scale=scale)
    result = advance(z, prediction, None, ROWS, counter(), alive, guidance=given, keep_x0=True, kernel=kernel)
    for b in range(2):
        size = {
            "raw": 0.1,
            "unit": 0.1 * x0[b].norm() / gradient[b].norm(),
            "cfg": 0.1 * scale[b] * 1.6 * guidance_norm[b] / gradient[b].norm(),
        }[rule]
        assert result.x0 is not None
        torch.testing.assert_close(result.x0[b], x0[b] - size * gradient[b], **TOLERANCES[torch.float32])


def test_arguments_are_not_written() -> None:
    given = latents((3, 4, 4, 4), 4)
    copies = [tensor.clone() for tensor in given]
    z, eps_hat, x0, previous = given
    alive = torch.tensor([True, True, False])
    step_of(z, eps_hat, x0, "triton", previous=previous, alive=alive, mix=mixing([1, 2, 0], [[0, 0, 4, 4]] * 3))
    assert all(torch.equal(now, before) for now, before in zip(given, copies, strict=True))
    assert alive.tolist() == [True, True, False]


def test_offsets_have_64_bits() -> None:
    """Sample 2 of 2^30 elements begins at element 2^31, where an offset of 32 bits would be negative."""
    z, eps_hat, x0, z_out, x0_out = (vast((3, 1, 1, 2**30)) for _ in range(5))
    inputs = vast((6, 1, 1, 2**30))
    for tensor, value in ((z, 1.0), (eps_hat, 2.0), (x0, 3.0)):
        tensor[2, 0, 0, :32] = value
    squares, alive = torch.ones(2, 3, 1), torch.ones(3, dtype=torch.bool)
    following = NextInput(inputs, torch.zeros(6), torch.zeros(STEPS))
    launch, _ = advance_launch(
        *(z, Prediction(x0, eps_hat, squares), None, ROWS, counter(), alive),
        guidance=None,
        noise=None,
        mix=None,
        next_input=following,
        keep_x0=True,
        frozen=None,
    )
    # Of each sample the first tile alone: the others are never touched.
    first = {**launch.arguments, "z_out": z_out, "x0_out": x0_out}
    replace(launch, grid=(3, 1), arguments=first).run()
    torch.testing.assert_close(z_out[2, 0, 0, :32], torch.full((32,), 0.2 * 1 + 0.7 * 3 + 0.4 * 2))
    assert x0_out[2, 0, 0, 31] == 3
    for copy in (2, 5):
        torch.testing.assert_close(inputs[copy, 0, 0, :32], 0.6 * z_out[2, 0, 0, :32])


MIX = mixing([1, 2, 0], [[0, 0, 1, 1]] * 3)
NEXT = buffers((3, 4, 2, 2), torch.float32)
OTHER = torch.ones(3, 4, 2, 1)
GRADIENT = torch.ones(3, 4, 2, 2)
SHARED = torch.ones(7, 4, 2, 2)
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "eps_hat": (
        "prediction.eps_hat: got shape",
        {"prediction": predicted(torch.ones(3, 4, 2, 2), torch.ones(2, 4, 2, 2))},
    ),
    "x0 in half": (
        "prediction.x0: got torch.float16",
        {"prediction": predicted(GRADIENT, GRADIENT)._replace(x0=GRADIENT.half())},
    ),
    "squares": (
        "prediction.squares: got shape",
        {"prediction": predicted(GRADIENT, GRADIENT)._replace(squares=torch.ones(2, 2, 1))},
    ),
    "previous": ("previous_x0: got shape", {"previous_x0": OTHER}),
    "noise": ("noise: got shape", {"noise": OTHER}),
    "noise of integers": ("noise: got torch.int64", {"noise": GRADIENT.long()}),
    "sample ids": ("noise.sample_ids: got torch.int32", {"noise": Draw(1, torch.ones(3, dtype=torch.int32))}),
    "alive": ("alive: got shape", {"alive": torch.ones(2, dtype=torch.bool)}),
    "alive as numbers": ("alive: got torch.float32", {"alive": torch.ones(3)}),
    "gradient": ("guidance.gradient: got shape", {"guidance": steering(OTHER)}),
    "finite": ("guidance.finite: got torch.float32", {"guidance": steering(GRADIENT, finite=torch.ones(3))}),
    "norm": ("guidance.norm: got shape", {"guidance": steering(GRADIENT, norm=torch.ones(2))}),
    "scale": ("guidance.scale: got shape", {"guidance": steering(GRADIENT, scale=torch.ones(6))}),
    "rule": ("guidance.rule: got 'best'", {"guidance": steering(GRADIENT, "best")}),
    "partners": ("mix.partners: got shape", {"mix": Mix(MIX.partners[:2], MIX.boxes)}),
    "partners as int32": ("mix.partners: got torch.int32", {"mix": Mix(MIX.partners.int(), MIX.boxes)}),
    "boxes": ("mix.boxes: got shape", {"mix": Mix(MIX.partners, MIX.boxes[:, :2])}),
    "boxes of another stride": (
        "mix.boxes: strides",
        {"mix": Mix(MIX.partners, MIX.boxes.transpose(0, 1).contiguous().transpose(0, 1))},
    ),
    "input": ("next_input.sample: got shape", {"next_input": NEXT._replace(sample=torch.ones(4, 4, 2, 2))}),
    "timestep": ("next_input.timestep: got shape", {"next_input": NEXT._replace(timestep=torch.ones(3))}),
    "timesteps": ("next_input.timesteps: got shape", {"next_input": NEXT._replace(timesteps=torch.ones(3))}),
    "frozen": ("frozen: got torch.int64", {"frozen": torch.zeros(STEPS, dtype=torch.int64)}),
    "table": ("rows: got", {"rows": torch.ones(2)}),
    "empty table": ("rows: got", {"rows": torch.ones(0, len(COLUMNS))}),
    "no gradient": ("guidance.gradient: got None", {"guidance": steering(GRADIENT)._replace(gradient=None)}),
    "no norm": ("guidance.norm: got None", {"guidance": steering(GRADIENT)._replace(norm=None)}),
    "no partners": ("mix.partners: got None", {"mix": MIX._replace(partners=None)}),
    "no timesteps": ("next_input.timesteps: got None", {"next_input": NEXT._replace(timesteps=None)}),
    "no sample ids": ("noise.sample_ids: got None", {"noise": Draw(1, None)}),
    "seed below 0": ("noise.seed: got -1", {"noise": Draw(-1, torch.arange(3))}),
    "seed above 64 bits": ("noise.seed: got", {"noise": Draw(2**64, torch.arange(3))}),
    "rho as text": ("guidance.rho: got '0.2'", {"guidance": steering(GRADIENT)._replace(rho="0.2")}),
    "rho as NaN": ("guidance.rho: got nan", {"guidance": steering(GRADIENT)._replace(rho=float("nan"))}),
    "rho below 0": ("guidance.rho: got -1", {"guidance": steering(GRADIENT)._replace(rho=-1.0)}),
    "partner outside": ("partners: indices 1..3 in a batch of 3", {"mix": Mix(MIX.partners + 1, MIX.boxes)}),
    "box outside": ("does not lie in the latent 2 x 2", {"mix": Mix(MIX.partners, MIX.boxes * 3)}),
    "shared with z": (
        "next_input.sample: it shares memory with z",
        {"z": SHARED[:3], "next_input": NEXT._replace(sample=SHARED[1:])},
    ),
    "shared with the gradient": (
        "it shares memory with guidance.gradient",
        {"guidance": steering(SHARED[4:]), "next_input": NEXT._replace(sample=SHARED[:6])},
    ),
    "another device": ("alive: on meta", {"alive": torch.ones(3, dtype=torch.bool, device="meta")}),
}
BAD_FOR_TRITON: dict[str, tuple[str, dict[str, Any]]] = {
    "gradient in double": (
        "gradient: torch.float64; the Triton kernel reads",
        {"guidance": steering(GRADIENT.double())},
    ),
    "strides of the gradient": ("gradient: strides", {"guidance": steering(torch.ones(3, 4, 2, 4)[..., ::2])}),
    "strides of z": ("z: strides", {"z": torch.ones(3, 4, 4, 2)[:, :, ::2]}),
    "strides of the input": (
        "next_input.sample: strides",
        {"next_input": NEXT._replace(sample=torch.ones(6, 4, 2, 4)[..., ::2])},
    ),
    "x0 of another format": (
        "prediction.x0: not of the memory format",
        {"z": GRADIENT.contiguous(memory_format=torch.channels_last)},
    ),
}


@pytest.mark.parametrize(
    ("case", "kernel"),
    [(case, kernel) for case in [*BAD, *BAD_FOR_TRITON] for kernel in KERNELS[case in BAD_FOR_TRITON :]],
)
def test_bad_arguments_are_refused_before_anything_is_written(case: str, kernel: Form) -> None:
    words, options = {**BAD, **BAD_FOR_TRITON}[case]
    step = counter()
    z, eps_hat, x0 = latents((3, 4, 2, 2), 3)
    given: dict[str, Any] = {"z": z, "prediction": predicted(x0, eps_hat), "previous_x0": None, "rows": ROWS}
    given |= {"step": step, "alive": torch.ones(3, dtype=torch.bool), "kernel": kernel, **options}
    with pytest.raises(ValueError, match=words):
        advance(**given)
    assert step.tolist() == [STEP, STEP]


@pytest.mark.parametrize("partner", [-1, 3, 10**12])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_partner_outside_that_slipped_through_gives_nothing(kernel: Form, partner: int) -> None:
    z, eps_hat, x0 = latents((3, 2, 4, 4), 3)
    partners, boxes = torch.arange(3).repeat(STEPS, 1), torch.zeros(STEPS, 3, 4, dtype=torch.int32)
    partners[STEP, 1], boxes[STEP, 1] = partner, torch.tensor([0, 0, 4, 4])
    made = step_of(z, eps_hat, x0, kernel, mix=Mix(partners, boxes, checked=True))
    plain = step_of(z, eps_hat, x0, kernel)
    assert made.alive.tolist() == [True, False, True]
    torch.testing.assert_close(made.z, plain.z)


@pytest.mark.parametrize("count", [-3, STEPS, STEPS + 5])
def test_a_counter_outside_the_table_stays_inside_the_memory(count: int) -> None:
    """As a captured step does that is replayed once too often."""
    z, eps_hat, x0 = latents((2, 1, 3, 3), 3)
    rows, guard = torch.rand(STEPS, len(COLUMNS)), torch.full((2 * STEPS,), 7, dtype=torch.int32)
    frozen = guard[:STEPS].zero_()
    step = torch.tensor([count, count], dtype=torch.int32)
    alive = torch.tensor([True, True])
    x0[0] = torch.nan
    made = advance(z, predicted(x0, eps_hat), None, rows, step, alive, frozen=frozen, kernel="triton")
    inside = min(max(count, 0), STEPS - 1)
    clamped = torch.tensor([inside, inside], dtype=torch.int32)
    assert torch.equal(made.z, advance(z, predicted(x0, eps_hat), None, rows, clamped, alive, kernel="triton").z)
    assert guard[STEPS:].tolist() == [7] * STEPS and frozen.tolist() == [int(at == inside) for at in range(STEPS)]


@pytest.mark.parametrize(
    ("partner", "box", "words"),
    [
        (3, [0, 0, 1, 1], "partners: indices 0..3 in a batch of 3"),
        (-1, [0, 0, 1, 1], "partners: indices -1..0 in a batch of 3"),
        (1, [0, 0, 3, 1], "does not lie in the latent 2 x 2"),
        (1, [-1, 0, 1, 1], "does not lie in the latent 2 x 2"),
        (1, [1, 1, 0, 2], "does not lie in the latent 2 x 2"),
    ],
)
def test_a_plan_that_points_outside_is_refused_where_it_is_made(partner: int, box: list[int], words: str) -> None:
    partners, boxes = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4, dtype=torch.int32)
    partners[1, 2], boxes[1, 2] = partner, torch.tensor(box)
    with pytest.raises(ValueError, match=words):
        checked_mix(partners, boxes, 2, 2, "cpu")
