"""Fan-out: what the children of a trajectory are, and that the first is the trajectory itself."""

import pytest
import torch
from torch import Tensor

from diffdfkd.engine.combinations import fork_step, round_samples, step_runs
from diffdfkd.engine.cutmix import CutMixPlan, plan_cutmix
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.fan_out import plan_fan_out
from diffdfkd.engine.plan import round_labels, shard_plan, trajectories
from diffdfkd.engine.recipe import CutMixRecipe, GuidanceRecipe, Recipe, load_recipe
from diffdfkd.engine.sampler import Trajectory, sample
from diffdfkd.engine.schedule import Table, make_table
from diffdfkd.engine.stages import Gradient
from diffdfkd.kernels.philox import STEP_NOISE, philox_normal

B, M, LATENT, CLASSES, STEPS, FORK = 6, 3, (2, 4, 6), 3, 6, 4
CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIG |= {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "epsilon"}
LABELS = torch.arange(B) % CLASSES


def unet(sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    near = 0.2 * (sample.roll(1, 2) + sample.roll(1, 3))
    drive = context.mean(1)[:, :2, None, None]
    return torch.tanh(0.3 * sample + near + drive) + sample * timestep[:, None, None, None] / 5000


def chain(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
    """Of a batch as a whole, as L_bn is."""
    goal = targets @ torch.arange(CLASSES).float()
    gradient = (x0 - goal[:, None, None, None]) / 4 + x0.mean(0, keepdim=True) / 8
    norm = gradient.flatten(1).norm(dim=1)
    return Gradient(gradient, norm, alive & torch.isfinite(norm), torch.stack([norm.mean()] * 4))


def planned(cutmix: CutMixRecipe, first: int = 0, fork: int = FORK, m: int = M, seed: int = 7) -> CutMixPlan:
    ids = torch.arange(m * B).view(m, B) + first
    return plan_fan_out(cutmix, LABELS, CLASSES, STEPS, LATENT[1:], seed, ids, fork)


def run(table: Table, plan: CutMixPlan, mode: str = "clean", noise: Tensor | None = None) -> Trajectory:
    generator = torch.Generator().manual_seed(4)
    drawn, context = torch.randn(B, *LATENT, generator=generator), torch.randn(2 * B, 3, 4, generator=generator)
    return sample(
        unet,
        table,
        context,
        scale=3.0,
        noise=drawn if noise is None else noise,
        sample_ids=torch.arange(B),
        seed=7,
        guidance=GuidanceRecipe.model_validate({"mode": mode, "rho": 0.2}),
        plan=plan,
        chain=chain,
        kernel="reference",
    )


def painted(plan: CutMixPlan) -> list[Tensor]:
    """Sample [B, h, w] of the trunk that each pixel of each batch of children comes from, box by box."""
    batches = []
    for branch, own in [(None, plan), *plan.tails]:
        pixels = torch.arange(B)[:, None, None].expand(B, *LATENT[1:]).clone()
        mixes = [(step, own.partners[step], own.boxes[step]) for step in range(STEPS)]
        if branch is not None:
            mixes.insert(branch.step, (branch.step - 1, branch.partners, branch.boxes))
        for _, partners, boxes in mixes:
            before = pixels.clone()
            for owner in range(B):
                top, left, bottom, right = boxes[owner].tolist()
                pixels[owner, top:bottom, left:right] = before[partners[owner], top:bottom, left:right]
        batches.append(pixels)
    return batches


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("partner", ["within", "across", "any"])
def test_labels_are_the_shares_of_the_pixels(partner: str, every: int) -> None:
    plan = planned(CutMixRecipe.model_validate({"every": every, "partner": partner, "probability": 0.8}))
    ends = torch.cat([plan.targets[-1], *(tail.plan.targets[-1] for tail in plan.tails)])
    owned = LABELS[torch.cat(painted(plan))]
    shares = torch.stack([(owned == label).flatten(1).float().mean(1) for label in range(CLASSES)], 1)
    torch.testing.assert_close(ends, shares)
    for branch, own in plan.tails:
        assert (branch.partners != torch.arange(B)).all()
        same = LABELS[branch.partners] == LABELS
        assert partner == "any" or bool((same == (partner == "within")).all())
        # The trunk is everyone's.
        assert torch.equal(own.targets[:FORK], plan.targets[:FORK])
        assert torch.equal(own.boxes[:FORK], plan.boxes[:FORK])
    if every:
        assert not torch.equal(plan.tails[0].plan.boxes[FORK:], plan.boxes[FORK:])


def test_parents_are_recorded_by_their_ids() -> None:
    plan = planned(CutMixRecipe.model_validate({"every": 1, "partner": "any", "probability": 1.0}), first=100)
    assert len(plan.lineage) == M * B and plan.lineage[:B] == plan.parents
    for child, (branch, own) in enumerate(plan.tails, 1):
        for owner in range(B):
            lineage = plan.lineage[child * B + owner]
            trunk = [parent for parent in lineage if parent.step < FORK - 1]
            assert trunk == [parent for parent in plan.parents[owner] if parent.step < FORK - 1]
            fork = [parent for parent in lineage if parent.step == FORK - 1][-1]
            assert (fork.partner, list(fork.box)) == (100 + int(branch.partners[owner]), branch.boxes[owner].tolist())
            later = [parent for parent in lineage if parent.step >= FORK]
            assert all(100 + child * B <= parent.partner < 100 + (child + 1) * B for parent in later)
            assert len(later) == int((own.partners[FORK:, owner] != owner).sum())


def test_a_plan_is_a_function_of_the_ids_alone() -> None:
    cutmix = CutMixRecipe(partner="any")
    first, again = planned(cutmix), planned(cutmix)
    for mine, other in zip(first.tails, again.tails, strict=True):
        assert torch.equal(mine.branch.boxes, other.branch.boxes)
    assert not torch.equal(first.tails[0].branch.boxes, first.tails[1].branch.boxes)
    assert not torch.equal(first.tails[0].branch.boxes, planned(cutmix, seed=8).tails[0].branch.boxes)
    assert all((tail.branch.boxes[:, 2:] > tail.branch.boxes[:, :2]).all() for tail in planned(cutmix, m=60).tails)


def test_one_child_is_no_fan_out() -> None:
    cutmix = CutMixRecipe(every=2, partner="any")
    plan = planned(cutmix, m=1, fork=STEPS)
    plain = plan_cutmix(cutmix, LABELS, CLASSES, STEPS, LATENT[1:], 7, torch.arange(B))
    assert plan.tails == () and plan.lineage == plain.parents
    assert torch.equal(plan.boxes, plain.boxes) and torch.equal(plan.targets, plain.targets)


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("mode", ["none", "clean", "reuse", "exact"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmsolver++"])
def test_the_first_child_is_the_unforked_trajectory_bit_for_bit(sampler: str, mode: str, every: int) -> None:
    table = make_table(sampler, CONFIG, STEPS)
    cutmix = CutMixRecipe(every=every, partner="any")
    whole = run(table, planned(cutmix, m=1, fork=STEPS), mode)
    forked = run(table, planned(cutmix), mode)
    assert forked.latents.shape == (M * B, *LATENT)
    assert torch.equal(forked.latents[:B], whole.latents) and torch.equal(forked.targets[:B], whole.targets)
    assert torch.equal(forked.losses[:FORK], whole.losses[:FORK]) or mode == "none"
    assert forked.losses.shape == whole.losses.shape and forked.alive.all()
    for child in range(1, M):
        assert (forked.latents[child * B : (child + 1) * B] != whole.latents).flatten(1).any(1).all()


@pytest.mark.parametrize("mode", ["none", "clean"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmsolver++"])
def test_children_are_those_of_the_plain_formulation(sampler: str, mode: str) -> None:
    """Trunk and tails written down naively, from the table's rows."""
    table = make_table(sampler, CONFIG, STEPS)
    plan = planned(CutMixRecipe(partner="any"))
    generator = torch.Generator().manual_seed(4)
    noise, context = torch.randn(B, *LATENT, generator=generator), torch.randn(2 * B, 3, 4, generator=generator)
    names = ["input_scale", "x0_z", "x0_m", "eps_z", "eps_m", "z", "x0", "eps", "previous", "noise", "alpha", "sigma"]

    def step(index: int, z: Tensor, before: Tensor, targets: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        row = dict(zip(names, table.rows[index], strict=True))
        output = unet((row["input_scale"] * z).repeat(2, 1, 1, 1), table.timesteps[index].repeat(2 * B), context)
        m = output[:B] + 3.0 * (output[B:] - output[:B])
        x0, eps = row["x0_z"] * z + row["x0_m"] * m, row["eps_z"] * z + row["eps_m"] * m
        if mode == "clean":
            found = chain(x0, targets, torch.ones(B, dtype=torch.bool), torch.ones(3))
            size = 0.2 * x0.flatten(1).norm(dim=1) / found.norm
            x0 = x0 - size[:, None, None, None] * found.gradient
        following = row["z"] * z + row["x0"] * x0 + row["eps"] * eps + row["previous"] * before
        return following + row["noise"] * philox_normal(7, ids, index, STEP_NOISE, LATENT), x0

    z, before = noise * table.initial_scale, torch.zeros_like(noise)
    for index in range(FORK):
        z, before = step(index, z, before, plan.targets[index], torch.arange(B))
    found = run(table, plan, mode).latents.split(B)
    for child, (branch, own) in enumerate(plan.tails, 1):
        mine, past = z.clone(), before.clone()
        for owner in range(B):
            top, left, bottom, right = branch.boxes[owner].tolist()
            mine[owner, :, top:bottom, left:right] = z[branch.partners[owner], :, top:bottom, left:right]
            past[owner, :, top:bottom, left:right] = before[branch.partners[owner], :, top:bottom, left:right]
        for index in range(FORK, STEPS):
            mine, past = step(index, mine, past, own.targets[index], torch.arange(B) + child * B)
        torch.testing.assert_close(found[child], mine, atol=2e-5, rtol=1e-4)


def test_who_takes_a_box_from_a_lost_trajectory_is_lost_too() -> None:
    table = make_table("ddim", CONFIG, STEPS)
    plan = planned(CutMixRecipe(partner="any"))
    noise = torch.randn(B, *LATENT, generator=torch.Generator().manual_seed(1))
    noise[4] = torch.nan
    # One by one, so that the lost sample spoils no other's gradient.
    made = run(table, plan, "none", noise)
    alive = made.alive.view(M, B)
    for child, expected in enumerate([torch.arange(B), *(tail.branch.partners for tail in plan.tails)]):
        assert torch.equal(alive[child], (torch.arange(B) != 4) & (expected != 4))
    took = sum(int((tail.branch.partners == 4).sum()) for tail in plan.tails)
    assert took and made.frozen.tolist() == [1, 0, 0, took, 0, 0]


def recipe(*overrides: str) -> Recipe:
    content = {
        "prior": "p",
        "teacher": {"architecture": "small_cnn", "classes": ["a", "b", "c"]},
        "student": {"architecture": "small_cnn"},
        "synthesis": {"images_per_class": 20, "batch_size": 7, "fan_out": 2, "steps": 5, "batches_per_shard": 2},
        "distillation": {"steps": 10},
    }
    return load_recipe(content, overrides)


@pytest.mark.parametrize("rounds", [1, 3])
def test_blocks_hold_each_trajectory_with_all_its_children_and_classes_are_balanced(rounds: int) -> None:
    made = recipe(f"rounds={rounds}")
    assert sum(round_samples(made, round) for round in range(rounds)) == 60
    for round in range(rounds):
        samples = round_samples(made, round)
        labels = round_labels(made, round, 0, samples)
        assert samples % 6 == 0 and labels.bincount(minlength=3).tolist() == [samples // 3] * 3
        _, parents = trajectories(made, round, 0, samples // 2)
        plans = shard_plan(made, round)
        assert [plan.samples for plan in plans[:-1]] == [28] * (len(plans) - 1)
        seen = 0
        for plan in plans:
            for first in range(plan.first, plan.first + plan.samples, 14):
                count = min(14, plan.first + plan.samples - first)
                block = round_labels(made, round, first, count).view(2, -1)
                ids, own = trajectories(made, round, seen, block.shape[1])
                assert torch.equal(block[0], block[1]) and torch.equal(block[0], own)
                assert torch.equal(own, parents[seen : seen + len(own)])
                assert (ids - round * 2**40).tolist() == list(range(first, first + len(own)))
                seen += len(own)
        assert seen == samples // 2
        assert torch.equal(round_labels(made, round, 5, 9), labels[5:14])


def test_without_fan_out_samples_are_trajectories() -> None:
    made = recipe("synthesis.fan_out=1")
    ids, labels = trajectories(made, 1, 4, 30)
    assert (ids - 2**40).tolist() == list(range(4, 34)) and torch.equal(round_labels(made, 1, 4, 30), labels)


def test_the_fork_lies_at_the_nearest_step() -> None:
    synthesis = recipe().synthesis
    assert fork_step(synthesis) == 4 and step_runs(synthesis) == [1, 1, 1, 1, 2]
    assert fork_step(recipe("synthesis.fork=0.6").synthesis) == 3
    assert [fork_step(recipe(f"synthesis.steps={steps}").synthesis) for steps in (2, 3, 4, 12)] == [1, 2, 3, 8]
    assert fork_step(recipe("synthesis.fan_out=1").synthesis) == 5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["synthesis.fork=0"], r"synthesis.fork: got 0.0 of synthesis.steps=5.* give 0.2 to 0.8"),
        (["synthesis.fork=0.9"], r"synthesis.fork: got 0.9 .* needs a step before it and one after"),
        (["synthesis.steps=1"], r"synthesis.fork: one step has no place"),
        (["synthesis.batch_size=1"], r"synthesis.fan_out: got 2, but synthesis.batch_size is 1"),
        (["synthesis.fan_out=3"], r"synthesis.fan_out: got 3 .*give synthesis.images_per_class=21"),
        (["rounds=11", "distillation.steps=20"], r"synthesis.fan_out: .*synthesis.images_per_class=22"),
        (["synthesis.batch_size=3"], r"cutmix.partner: within finds no partner"),
        (["synthesis.images_per_class=2"], r"cutmix.partner: within .* at most one trajectory of a class"),
    ],
)
def test_what_cannot_fork_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipe(*overrides)
