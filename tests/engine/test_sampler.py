from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from diffdfkd.engine.combinations import guided_steps
from diffdfkd.engine.cutmix import plan_cutmix
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.fan_out import plan_fan_out
from diffdfkd.engine.recipe import CutMixRecipe, GuidanceRecipe
from diffdfkd.engine.sampler import sample
from diffdfkd.engine.schedule import Table, make_table
from diffdfkd.engine.stages import Gradient, guidance_chain
from diffdfkd.engine.taps import BatchNormTaps
from diffdfkd.kernels.advance import _advance_kernel, advance
from diffdfkd.kernels.launch import Launch
from diffdfkd.kernels.philox import STEP_NOISE, philox_normal
from diffdfkd.kernels.row import COLUMNS, Row

BATCH, LATENT, CLASSES, STEPS = 6, (2, 4, 6), 3, 6
CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIG |= {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "epsilon"}
SAMPLERS = ("ddim", "ddpm", "euler", "dpmsolver++", "lcm")
OFF = CutMixRecipe(every=0)
MIX = CutMixRecipe(every=1, probability=0.8, partner="any")


class ToyUNet:
    """Smooth, nonlinear, one sample at a time; counts its calls and can fail on chosen samples of one call."""

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        self.weight = 0.3 * torch.randn(2, 2, 3, 3, generator=generator, dtype=dtype)
        self.calls, self.fails = 0, {}

    def __call__(self, sample, timestep, context):
        mixed = torch.nn.functional.conv2d(sample, self.weight.to(sample.dtype), padding=1)
        drive = context.mean(1)[:, :2, None, None].to(sample.dtype)
        output = torch.tanh(mixed + drive) + 0.1 * sample * (timestep / 1000).to(sample.dtype)[:, None, None, None]
        for index in self.fails.get(self.calls, ()):
            output = output.clone()
            output[index] = float("nan")
        self.calls += 1
        return output


GOAL = torch.randn(LATENT, generator=torch.Generator().manual_seed(9))


def toy_loss(x0):
    """B * L of a toy: each sample has a loss of its own."""
    return torch.nn.functional.smooth_l1_loss(x0, GOAL.to(x0.dtype).expand_as(x0), reduction="sum", beta=2.0)


def toy_chain(x0, targets, alive, weights=None):
    finite = alive & x0.isfinite().flatten(1).all(1)
    gradient = ((x0 - GOAL) / 2).clamp(-1, 1)
    gradient = torch.where(finite[:, None, None, None], gradient, 0)
    losses = torch.stack([toy_loss(torch.where(finite[:, None, None, None], x0, GOAL)) / len(x0)] * 4)
    return Gradient(gradient, gradient.flatten(1).norm(dim=1), finite, losses)


def plan(recipe=OFF, steps=STEPS, ids=None):
    ids = torch.arange(BATCH) if ids is None else ids
    return plan_cutmix(recipe, ids % CLASSES, CLASSES, steps, LATENT[1:], 7, ids)


def inputs(n=BATCH, doubled=True):
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(n, *LATENT, generator=generator)
    context = torch.randn(2 * n if doubled else n, 3, 4, generator=generator)
    return noise, context


def run(table, mode="none", rule="unit", recipe=OFF, unet=None, chain=toy_chain, scale=3.0, kernel="auto", **fields):
    noise, context = inputs(doubled=not isinstance(scale, float) or scale != 1)
    guidance = GuidanceRecipe(**{"mode": mode, "rho_rule": rule, "rho": 0.2, **fields})
    return sample(
        unet or ToyUNet(),
        table,
        context,
        scale=scale,
        noise=noise,
        sample_ids=torch.arange(BATCH),
        seed=7,
        guidance=guidance,
        plan=plan(recipe, table.steps),
        chain=chain,
        kernel=kernel,
    )


def plain(table, mode, rule, recipe, scale=3.0, rho=0.2):
    """The method written down naively, one sample at a time where it can be, autograd for every gradient: all z."""
    noise, context = inputs()
    made, unet = plan(recipe, table.steps), ToyUNet()
    z, previous = noise * table.initial_scale, torch.zeros_like(noise)
    states = []

    def look(z, row, timestep):
        output = unet((row.input_scale * z).repeat(2, 1, 1, 1), timestep.repeat(2 * BATCH), context)
        free, bound = output[:BATCH], output[BATCH:]
        m = free + scale * (bound - free)
        eps_free, eps_bound = (row.eps_z * z + row.eps_m * half for half in (free, bound))
        return row.x0_z * z + row.x0_m * m, row.eps_z * z + row.eps_m * m, eps_bound - eps_free

    def move(point, gradient, difference, ratio):
        moved = point.clone()
        for b in range(BATCH):
            length = {
                "raw": rho,
                "unit": rho * point[b].norm() / gradient[b].norm(),
                "cfg": rho * scale * ratio * difference[b].norm() / gradient[b].norm(),
            }[rule]
            moved[b] = point[b] - length * gradient[b]
        return moved

    for step in range(table.steps):
        row, timestep = Row(*table.rows[step].tolist()), table.timesteps[step]
        x0, eps, difference = look(z, row, timestep)
        if mode == "clean":
            leaf = x0.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(toy_loss(leaf), leaf)
            x0 = move(x0, gradient, difference, row.sigma / row.alpha)
        elif mode != "none":
            leaf = (row.input_scale * z).requires_grad_()
            (gradient,) = torch.autograd.grad(toy_loss(look(leaf / row.input_scale, row, timestep)[0]), leaf)
            z = move(row.input_scale * z, gradient, difference, 1.0) / row.input_scale
            if mode == "exact":
                x0, eps, _ = look(z, row, timestep)
            else:
                x0 = (row.input_scale * z - row.sigma * eps) / row.alpha
        following = row.z * z + row.x0 * x0 + row.eps * eps + row.previous * previous
        following = following + row.noise * philox_normal(7, torch.arange(BATCH), step, STEP_NOISE, LATENT)
        z, previous = following.clone(), x0.clone()
        for b in range(BATCH):
            top, left, bottom, right = made.boxes[step, b].tolist()
            partner = int(made.partners[step, b])
            z[b, :, top:bottom, left:right] = following[partner, :, top:bottom, left:right]
            previous[b, :, top:bottom, left:right] = x0[partner, :, top:bottom, left:right]
        states.append(z)
    return states


@pytest.fixture
def states(monkeypatch):
    """z after each step of the loop, as it goes."""
    found = []

    def recording(*tensors, **options):
        made = advance(*tensors, **options)
        found.append(made.z)
        return made

    monkeypatch.setattr("diffdfkd.engine.loop.advance", recording)
    return found


@pytest.mark.parametrize("recipe", [OFF, MIX], ids=["whole", "mixed"])
@pytest.mark.parametrize("mode", ["none", "clean", "reuse", "exact"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_trajectory_is_that_of_the_plain_formulation_step_by_step(sampler, mode, recipe, kernel, states):
    table = make_table(sampler, CONFIG, STEPS, "cpu")
    made = run(table, mode, recipe=recipe, kernel=kernel)
    assert len(states) == STEPS and torch.equal(states[-1], made.latents)
    for step, (state, expected) in enumerate(zip(states, plain(table, mode, "unit", recipe), strict=True)):
        # Rounding grows along the way; at its end a tenth of the largest step is still seen.
        size = float(expected.abs().max())
        torch.testing.assert_close(state, expected, rtol=0, atol=size * 3e-6 * 3.0**step, msg=f"step {step}")
    assert made.alive.all()
    assert recipe is OFF or not torch.allclose(made.latents, run(table, mode).latents, atol=1e-2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("rule", ["raw", "unit", "cfg"])
@pytest.mark.parametrize("mode", ["clean", "reuse", "exact"])
@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_rules_and_prediction_types_are_those_of_the_plain_formulation(mode, rule, prediction_type, kernel):
    table = make_table("ddim", {**CONFIG, "prediction_type": prediction_type}, STEPS, "cpu")
    made = run(table, mode, rule, kernel=kernel)
    torch.testing.assert_close(made.latents, plain(table, mode, rule, OFF)[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
def test_without_guidance_equals_diffusers(sampler):
    import diffusers

    kinds = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpmsolver++": "DPMSolverMultistepScheduler"}
    scheduler = getattr(diffusers, kinds[sampler]).from_config(CONFIG)
    scheduler.set_timesteps(STEPS)
    noise, context = inputs()
    z, unet = noise * scheduler.init_noise_sigma, ToyUNet()
    for timestep in scheduler.timesteps:
        free, bound = unet(
            scheduler.scale_model_input(torch.cat([z, z]), timestep), timestep.repeat(2 * BATCH), context
        ).chunk(2)
        z = scheduler.step(free + 3.0 * (bound - free), timestep, z).prev_sample
    torch.testing.assert_close(run(make_table(sampler, CONFIG, STEPS, "cpu")).latents, z, rtol=1e-4, atol=1e-4)


def test_mode_none_and_no_chain_are_the_same_and_have_no_losses():
    table = make_table("ddpm", CONFIG, STEPS, "cpu")
    first, second = run(table, "none"), run(table, "clean", chain=None)
    assert torch.equal(first.latents, second.latents)
    assert first.losses.shape == (STEPS, 4) and first.losses.isnan().all() and second.losses.isnan().all()


def two_tables():
    """DDIM and the same steps in Euler's own scale of z."""
    alpha = torch.linspace(0.1, 0.9, STEPS, dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    next_alpha, next_sigma = torch.cat([alpha[1:], alpha.new_ones(1)]), torch.cat([sigma[1:], sigma.new_zeros(1)])
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    shared = {"eps_z": zero, "eps_m": one, "z": zero, "previous": zero, "noise": zero, "alpha": alpha, "sigma": sigma}
    shared |= {"x0_m": -sigma / alpha}
    ddim = shared | {"input_scale": one, "x0_z": 1 / alpha, "x0": next_alpha, "eps": next_sigma}
    euler = shared | {"input_scale": alpha, "x0_z": one, "x0": one, "eps": next_sigma / next_alpha}
    timesteps = torch.linspace(900, 10, STEPS)
    for columns, scale in ((ddim, 1.0), (euler, 1 / float(alpha[0]))):
        rows = torch.stack([columns[name] for name in COLUMNS], 1).float()
        yield Table(timesteps, rows, scale, "ddim", STEPS, (False,) * STEPS, (False,) * STEPS)


@pytest.mark.parametrize("rule", ["raw", "unit", "cfg"])
@pytest.mark.parametrize("mode", ["none", "clean", "reuse", "exact"])
def test_euler_is_guided_like_ddim_which_it_equals_but_for_the_scale_of_z(mode, rule):
    ddim, euler = two_tables()
    torch.testing.assert_close(run(euler, mode, rule).latents, run(ddim, mode, rule).latents, rtol=1e-3, atol=1e-4)


def test_clean_ddim_step_is_linear_in_z_eps_and_gradient():
    ddim, _ = two_tables()
    first = Table(ddim.timesteps[:1], ddim.rows[:1], 1.0, "ddim", 1, (False,), (False,))
    noise, context = inputs()
    free, bound = ToyUNet()(torch.cat([noise, noise]), first.timesteps.repeat(2 * BATCH), context).chunk(2)
    eps = free + 3.0 * (bound - free)
    row = Row(*first.rows[0].tolist())
    alpha, sigma, next_alpha, next_sigma = row.alpha, row.sigma, row.x0, row.eps
    x0 = ((noise - sigma * eps) / alpha).requires_grad_()
    (gradient,) = torch.autograd.grad(toy_loss(x0), x0)
    expected = (
        next_alpha / alpha * noise + (next_sigma - next_alpha * sigma / alpha) * eps - 0.2 * next_alpha * gradient
    )
    torch.testing.assert_close(run(first, "clean", "raw").latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mode", "calls"), [("none", 1), ("clean", 1), ("reuse", 1), ("exact", 2)])
def test_unet_calls_per_step(mode, calls):
    unet = ToyUNet()
    run(make_table("ddim", CONFIG, STEPS, "cpu"), mode, unet=unet)
    assert unet.calls == calls * STEPS


@pytest.mark.parametrize("mode", ["clean", "reuse", "exact"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "euler"])
def test_guidance_lowers_the_loss(sampler, mode):
    table = make_table(sampler, CONFIG, STEPS, "cpu")
    assert toy_loss(run(table, mode, rho=0.1).latents) < 0.9 * toy_loss(run(table).latents)


@pytest.mark.parametrize("mode", ["clean", "reuse", "exact"])
def test_per_sample_scales_and_no_doubling_at_scale_one(mode):
    table = make_table("ddim", CONFIG, STEPS, "cpu")
    torch.testing.assert_close(run(table, mode, scale=torch.full((BATCH,), 3.0)).latents, run(table, mode).latents)
    # At scale 1 the unconditional half drops out, so the halved call must agree with the doubled one.
    noise, context = inputs()
    guidance = GuidanceRecipe(mode=mode, rho=0.2)
    results = [
        sample(
            ToyUNet(),
            table,
            given,
            scale=1.0,
            noise=noise,
            sample_ids=torch.arange(BATCH),
            seed=7,
            guidance=guidance,
            plan=plan(),
            chain=toy_chain,
        ).latents
        for given in (context, context[BATCH:])
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_reuse_survives_zero_terminal_snr():
    config = {**CONFIG, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    table = make_table("ddim", {**config, "timestep_spacing": "trailing"}, STEPS, "cpu")
    assert table.rows[0, COLUMNS.index("alpha")] == 0
    made = run(table, "reuse")
    assert made.alive.all() and made.latents.isfinite().all()


def test_window_and_every_choose_the_guided_steps():
    def chosen(steps, **fields):
        return [step for step, on in enumerate(guided_steps(GuidanceRecipe(**fields), steps)) if on]

    assert chosen(10) == list(range(10))
    assert chosen(10, mode="none") == []
    assert chosen(10, window=(0.2, 0.8)) == [2, 3, 4, 5, 6, 7]
    assert chosen(10, window=(0.2, 0.8), every=3) == [2, 5]
    assert chosen(100, window=(0.07, 0.57)) == list(range(7, 57))
    assert chosen(3, window=(0.5, 1.0)) == [2]
    with pytest.raises(UserError, match=r"guidance\.window: \[0\.51, 0\.55\] holds none of the 10 steps"):
        chosen(10, window=(0.51, 0.55))


@pytest.mark.parametrize("mode", ["clean", "reuse", "exact"])
def test_only_guided_steps_have_losses_and_call_the_chain(mode):
    calls = []

    def chain(x0, targets, alive, weights):
        calls.append(targets)
        return toy_chain(x0, targets, alive)

    made = run(make_table("ddim", CONFIG, STEPS, "cpu"), mode, chain=chain, recipe=MIX, window=(0.0, 0.7), every=2)
    guided = [0, 2, 4]
    assert made.losses[guided].isfinite().all() and made.losses[[1, 3, 5]].isnan().all()
    targets = plan(MIX).targets
    for step, given in zip(guided, calls, strict=True):
        assert torch.equal(given, targets[step])
    assert torch.equal(made.targets, targets[-1]) and not torch.equal(targets[0], targets[-1])


@pytest.mark.parametrize("sampler", ["ddpm", "dpmsolver++"])
@pytest.mark.parametrize("mode", ["none", "clean", "reuse", "exact"])
@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_a_sample_that_fails_is_dropped_and_the_others_do_not_notice(mode, sampler, kernel):
    table = make_table(sampler, CONFIG, STEPS, "cpu")
    broken = ToyUNet()
    broken.fails = {2: (BATCH + 1,), 3: (4, 3)}  # the conditional half of sample 1, then samples 3 and 4
    made, sound = run(table, mode, unet=broken, kernel=kernel), run(table, mode, kernel=kernel)
    lost = torch.tensor([False, True, False, True, True, False])
    assert torch.equal(made.alive, ~lost)
    assert torch.equal(made.latents[~lost], sound.latents[~lost])


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_who_was_to_take_a_patch_from_a_failed_sample_is_dropped_too(kernel):
    table = make_table("ddim", CONFIG, STEPS, "cpu")
    broken = ToyUNet()
    broken.fails = {0: (1,)}
    some = MIX.model_copy(update={"probability": 0.3})
    made, sound = run(table, recipe=some, unet=broken, kernel=kernel), run(table, recipe=some, kernel=kernel)
    lost = {1}
    for partners in plan(some).partners.tolist():
        lost |= {b for b in range(BATCH) if partners[b] in lost}
    assert 1 < len(lost) < BATCH
    assert [b for b in range(BATCH) if not made.alive[b]] == sorted(lost)
    assert torch.equal(made.latents[made.alive], sound.latents[made.alive])


def test_a_chain_that_cannot_guide_a_sample_freezes_it():
    def chain(x0, targets, alive, weights):
        result = toy_chain(x0, targets, alive)
        return result._replace(finite=result.finite & (torch.arange(len(x0)) != 2))

    for mode in ("clean", "reuse", "exact"):
        made = run(make_table("ddim", CONFIG, STEPS, "cpu"), mode, chain=chain)
        assert made.alive.tolist() == [True, True, False, True, True, True]
        assert torch.equal(made.latents[2], inputs()[0][2])


def test_no_gradient_means_no_update():
    def chain(x0, targets, alive, weights):
        zero = torch.zeros_like(x0)
        return Gradient(zero, zero.flatten(1).norm(dim=1), alive, torch.zeros(4))

    table = make_table("ddim", CONFIG, STEPS, "cpu")
    for mode in ("clean", "reuse", "exact"):
        for rule in ("raw", "unit", "cfg"):
            made = run(table, mode, rule, chain=chain)
            assert made.alive.all()
            torch.testing.assert_close(made.latents, run(table).latents)


def test_a_sample_depends_on_its_id_and_not_on_its_batch():
    table = make_table("ddpm", CONFIG, STEPS, "cpu")
    noise, context = inputs()
    guidance = GuidanceRecipe(mode="clean", rho=0.2)

    def some(chosen):
        ids = torch.tensor(chosen)
        return sample(
            ToyUNet(),
            table,
            context[torch.cat([ids, ids + BATCH])],
            scale=3.0,
            noise=noise[ids],
            sample_ids=ids,
            seed=7,
            guidance=guidance,
            plan=plan(ids=ids),
            chain=toy_chain,
        ).latents

    whole = some(range(BATCH))
    assert torch.equal(whole, some(range(BATCH)))
    torch.testing.assert_close(some([4, 1]), whole[[4, 1]], rtol=1e-4, atol=1e-5)


class Synchronisations(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = Counter()
        for name in ("tolist", "cpu", "numpy", "item", "__bool__", "__float__", "__int__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name, method):
        def counted(tensor, *arguments, **options):
            self.found[name] += 1
            return method(tensor, *arguments, **options)

        return counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masked or name in self.WAITING:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def small_chain(device="cpu"):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(32, CLASSES))
    teacher = teacher.eval().requires_grad_(False).to(device)
    student = nn.Sequential(nn.Flatten(), nn.Linear(24, CLASSES)).eval().to(device)
    weights = GuidanceRecipe(class_weight=1.0, batchnorm_weight=0.2, adversarial_weight=0.5)
    return guidance_chain(
        lambda x0: x0.mean(1, keepdim=True).sigmoid(), teacher, BatchNormTaps(teacher), weights, student
    )


@pytest.mark.parametrize(
    ("sampler", "mode", "rule"),
    [("ddpm", "clean", "unit"), ("dpmsolver++", "clean", "cfg"), ("euler", "reuse", "raw"), ("lcm", "exact", "unit")],
)
def test_no_step_waits_for_the_device(monkeypatch, sampler, mode, rule):
    found = []
    chain = small_chain()
    for steps in (2, 4):
        table = make_table(sampler, CONFIG, steps, "cpu")
        made = plan(MIX, steps)
        noise, context = inputs()
        with monkeypatch.context() as patch, Synchronisations(patch) as mode_of_counting:
            sample(
                ToyUNet(),
                table,
                context,
                scale=3.0,
                noise=noise,
                sample_ids=torch.arange(BATCH),
                seed=7,
                guidance=GuidanceRecipe(mode=mode, rho_rule=rule),
                plan=made,
                chain=chain,
            )
        found.append(mode_of_counting.found)
    # What is asked once before the loop does not grow with the steps.
    assert found[0] == found[1]
    assert not any(found[1][name] for name in (*Synchronisations.WAITING, "index", "index_put", "index_put_"))


@pytest.fixture
def meta_stages(monkeypatch):
    """Stages that run on the meta device, for which there is no autocast."""
    monkeypatch.setattr("diffdfkd.engine.stages.arithmetic", lambda *_: nullcontext())


class CopiesToTheHost(TorchDispatchMode):
    """Counts operations that read a tensor of the meta device, which stands for a GPU, and make one on the CPU."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        read = [tensor for tensor in tree_flatten((args, kwargs))[0] if isinstance(tensor, torch.Tensor)]
        written = [tensor for tensor in tree_flatten(made)[0] if isinstance(tensor, torch.Tensor)]
        if any(tensor.is_meta for tensor in read) and any(not tensor.is_meta for tensor in written):
            self.found[function.__name__] += 1
        return made


def on_meta(chain, table, mode, rule, kernel, recipe=MIX, made=None):
    """A whole trajectory on the meta device, whose tensors have no values: to ask for one is an error."""
    noise, context = inputs()
    weight = ToyUNet().weight.to("meta")

    def unet(sample, timestep, context):
        drive = context.mean(1)[:, :2, None, None]
        return torch.tanh(torch.nn.functional.conv2d(sample, weight, padding=1) + drive) + timestep[:, None, None, None]

    return sample(
        unet,
        table,
        context.to("meta"),
        scale=3.0,
        noise=noise.to("meta"),
        sample_ids=torch.arange(BATCH),
        seed=7,
        guidance=GuidanceRecipe(mode=mode, rho_rule=rule),
        plan=made or plan(recipe, table.steps),
        chain=chain,
        kernel=kernel,
    )


@pytest.mark.usefixtures("meta_stages")
@pytest.mark.parametrize("mode", ["none", "clean", "exact"])
@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_forks_blends_and_repairs_ask_no_value_of_the_device(monkeypatch, kernel, mode):
    monkeypatch.setattr(Launch, "run", lambda launch: None)
    chain, table = small_chain("meta"), make_table("ddim", CONFIG, STEPS, "cpu")
    recipe = CutMixRecipe(every=2, partner="any", prompt="blend", repair="masked", passes=2)
    ids = torch.arange(3 * BATCH).view(3, BATCH)
    made = plan_fan_out(recipe, torch.arange(BATCH) % CLASSES, CLASSES, STEPS, LATENT[1:], 7, ids, 4)
    with CopiesToTheHost() as copies:
        ended = on_meta(chain, table, mode, "unit", kernel, made=made)
    assert not copies.found
    assert ended.latents.is_meta and ended.latents.shape == (3 * BATCH, *LATENT)


@pytest.mark.usefixtures("meta_stages")
@pytest.mark.parametrize(("mode", "per_step"), [("none", 2), ("clean", 2), ("reuse", 3), ("exact", 4)])
@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loop_asks_no_value_of_the_device(monkeypatch, sampler, kernel, mode, per_step):
    launched = []
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(launch.kernel))
    chain, table = small_chain("meta"), make_table(sampler, CONFIG, STEPS, "cpu")
    with CopiesToTheHost() as copies:
        made = on_meta(chain, table, mode, "unit", kernel)
    assert not copies.found
    assert made.latents.is_meta and made.latents.shape == (BATCH, *LATENT)
    # Clean mode is two launches a step; exact has a second prediction and the move of z.
    assert len(launched) == (per_step * STEPS if kernel == "triton" else 0)


def test_the_meta_device_refuses_to_tell_a_value_and_copies_are_counted():
    tensor = torch.ones(2, device="meta")
    for ask in (lambda: tensor.sum().item(), lambda: bool(tensor.any()), tensor.tolist, tensor.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()
    with CopiesToTheHost() as copies:
        torch.empty_like(tensor, device="cpu")
    assert copies.found


@pytest.mark.usefixtures("meta_stages")
@pytest.mark.parametrize("mode", ["none", "clean", "exact"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "ddpm"])
def test_a_step_without_cutmix_is_the_same_launch(monkeypatch, sampler, mode):
    launched = []
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(launch))
    steps = 12
    table = make_table(sampler, CONFIG, steps, "cpu")
    sparse = CutMixRecipe(every=4, probability=1.0, partner="any")
    on_meta(small_chain("meta"), table, mode, "unit", "triton", sparse)
    constants = [launch.constants for launch in launched if launch.kernel is _advance_kernel]
    with_mix = [launch.arguments["partners"] is not None for launch in launched if launch.kernel is _advance_kernel]
    assert all(with_mix) and len(with_mix) == steps
    # The first steps of a multistep sampler look no further back, the last ones of a stochastic one draw nothing.
    middle = constants[2:-2]
    assert all(each == middle[0] for each in middle)


@pytest.mark.parametrize("mode", ["clean", "reuse", "exact"])
def test_the_chain_is_told_who_is_alive(mode):
    told = []

    def chain(x0, targets, alive, weights):
        told.append(alive.tolist())
        return toy_chain(x0, targets, alive)._replace(finite=alive & (torch.arange(BATCH) != 2 + len(told)))

    run(make_table("ddim", CONFIG, 3, "cpu"), mode, chain=chain)
    assert told == [[b not in lost for b in range(BATCH)] for lost in ((), (3,), (3, 4))]


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_a_sample_that_overflows_in_the_last_step_is_dropped(kernel):
    ddim, _ = two_tables()
    last = Table(ddim.timesteps[:1], ddim.rows[:1].clone(), 1.0, "ddim", 1, (False,), (False,))
    last.rows[0, COLUMNS.index("x0")] = 3e38
    made = run(last, kernel=kernel)
    assert not made.latents.isfinite().all() and not made.alive.any()


def test_a_context_that_does_not_fit_is_refused():
    table = make_table("ddim", CONFIG, 2, "cpu")
    noise, context = inputs()
    given = {"noise": noise, "sample_ids": torch.arange(BATCH), "seed": 7, "guidance": GuidanceRecipe(mode="none")}
    given["plan"] = plan(steps=2)
    for rows, scale, words in (
        (BATCH, 3.0, "scale: got 3.0 with a context that is not doubled"),
        (BATCH, torch.ones(BATCH), "with a context that is not doubled"),
        (BATCH + 1, 3.0, "context: got 7 rows for 6 latents"),
    ):
        with pytest.raises(ValueError, match=words):
            sample(ToyUNet(), table, context[:rows], scale=scale, **given)


def test_a_plan_that_points_outside_is_refused_where_it_is_made():
    made = plan(MIX)
    for field, words in (("partners", "partners: indices"), ("boxes", "does not lie in the latent 4 x 6")):
        with pytest.raises(ValueError, match=words):
            replace(made, **{field: getattr(made, field) + 7})


def test_frozen_samples_are_counted_where_they_freeze():
    for kernel in ("reference", "triton"):
        broken = ToyUNet()
        broken.fails = {2: (BATCH + 1,), 3: (4, 3)}
        made = run(make_table("ddim", CONFIG, STEPS, "cpu"), "clean", unet=broken, kernel=kernel)
        assert made.frozen.tolist() == [0, 0, 1, 2, 0, 0] and made.frozen.dtype == torch.int32


def test_the_count_of_synchronisations_sees_them(monkeypatch):
    with monkeypatch.context() as patch, Synchronisations(patch) as mode_of_counting:
        value = torch.ones(2)
        value.sum().item()
        bool(value.any())
        value.tolist()
        value[value > 0]
    assert set(mode_of_counting.found) >= {"item", "__bool__", "tolist", "_local_scalar_dense", "index"}
