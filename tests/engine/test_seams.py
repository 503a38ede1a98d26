"""What is done right after a mix: blended prompts and seams that are denoised again, against the naive loop."""

import pytest
import torch
from torch import Tensor

from diffdfkd.engine.captured import CapturedSampler
from diffdfkd.engine.cutmix import CutMixPlan
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.fan_out import plan_fan_out
from diffdfkd.engine.recipe import CutMixRecipe, GuidanceRecipe, load_recipe
from diffdfkd.engine.sampler import Trajectory, sample
from diffdfkd.engine.schedule import make_table
from diffdfkd.engine.stages import Gradient
from diffdfkd.kernels.box import box_mask, seam_band
from diffdfkd.kernels.philox import REPAIR, philox_normal
from diffdfkd.kernels.row import Row

B, M, LATENT, CLASSES, STEPS, FORK, SCALE = 6, 2, (2, 6, 8), 3, 6, 4, 3.0
CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIG |= {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "epsilon"}
TABLE = make_table("ddim", CONFIG, STEPS)
NOISE = torch.randn(B, *LATENT, generator=torch.Generator().manual_seed(4))
CONTEXT = torch.randn(2 * B, 3, 4, generator=torch.Generator().manual_seed(5))
IDS = torch.arange(M * B).view(M, B)


def unet(sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    near = 0.2 * (sample.roll(1, 2) + sample.roll(1, 3))
    drive = context.mean(1)[:, :2, None, None]
    return torch.tanh(0.3 * sample + near + drive) + sample * timestep[:, None, None, None] / 5000


class Buffered:
    """The same UNet on buffers of its own, which engines read whatever they are handed."""

    def claim(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = len(context)
        self.held = torch.zeros(rows, *LATENT), torch.zeros(rows), context.clone()
        return self.held

    def __call__(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        assert all(a is b for a, b in zip((sample, timestep, context), self.held, strict=True))
        return unet(*self.held)


def chain(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
    gradient = (x0 - (targets @ torch.arange(CLASSES).float())[:, None, None, None]) / 4
    norm = gradient.flatten(1).norm(dim=1)
    return Gradient(gradient, norm, alive & torch.isfinite(norm), torch.stack([norm.mean()] * 4))


def planned(fan_out: int = 1, **fields: object) -> CutMixPlan:
    cutmix = CutMixRecipe.model_validate({"every": 2, "partner": "any", "probability": 0.7, **fields})
    fork = FORK if fan_out > 1 else STEPS
    return plan_fan_out(cutmix, torch.arange(B) % CLASSES, CLASSES, STEPS, LATENT[1:], 7, IDS[:fan_out], fork)


def run(plan: CutMixPlan, mode: str = "clean", stage: object = unet) -> Trajectory:
    guidance = GuidanceRecipe.model_validate({"mode": mode, "rho": 0.2, "window": [0.2, 1.0]})
    return sample(
        stage,  # type: ignore[arg-type]
        TABLE,
        CONTEXT,
        scale=SCALE,
        noise=NOISE,
        sample_ids=IDS[0],
        seed=7,
        guidance=guidance,
        plan=plan,
        chain=chain,
        kernel="reference",
    )


def naive(plan: CutMixPlan, fields: dict[str, object], guided: bool = True) -> Tensor:
    """All batches of children, sample by sample and box by box, from the published formulas of RePaint and DDIM."""
    width, passes = int(str(fields.get("band", 1))), int(str(fields.get("passes", 1)))
    height, breadth = LATENT[1:]

    def take(values: Tensor, partners: Tensor, boxes: Tensor) -> Tensor:
        made = values.clone()
        for owner in range(B):
            top, left, bottom, right = boxes[owner].tolist()
            made[owner, ..., top:bottom, left:right] = values[partners[owner], ..., top:bottom, left:right]
        return made

    def told(pixels: Tensor) -> Tensor:
        """Context by whose pixels [B, h, w] they are."""
        if fields.get("prompt") != "blend":
            return CONTEXT
        bound = torch.stack([CONTEXT[B + own.flatten()].mean(0) for own in pixels])
        return torch.cat([CONTEXT[:B], bound])

    def clean(index: int, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        row = Row(*TABLE.rows[index].double())
        output = unet(z.float().repeat(2, 1, 1, 1), TABLE.timesteps[index].repeat(2 * B), context.float()).double()
        eps = output[:B] + SCALE * (output[B:] - output[:B])
        return (z - row.sigma * eps) / row.alpha, eps

    def down(index: int, x0: Tensor, eps: Tensor) -> Tensor:
        row = Row(*TABLE.rows[index].double())
        return row.x0 * x0 + row.eps * eps

    def mend(index: int, z: Tensor, boxes: Tensor, context: Tensor, ids: Tensor) -> Tensor:
        if fields.get("repair") != "masked":
            return z
        row = Row(*TABLE.rows[index].double())
        ratio = row.alpha / row.x0
        beta = row.sigma**2 - ratio**2 * row.eps**2
        for turn in range(passes):
            noise = philox_normal(7, ids, index * passes + turn, REPAIR, LATENT).double()
            again = down(index, *clean(index, ratio * z + beta.sqrt() * noise, context))
            for owner in range(B):
                top, left, bottom, right = boxes[owner].tolist()
                for y in range(height):
                    for x in range(breadth):
                        # Seams lie between pixels: the nearest pixel on the other side is how far away?
                        inside = top <= y < bottom and left <= x < right
                        others = [
                            max(abs(y - v), abs(x - u))
                            for v in range(height)
                            for u in range(breadth)
                            if (top <= v < bottom and left <= u < right) != inside
                        ]
                        if bottom > top and others and min(others) <= width:
                            z[owner, :, y, x] = again[owner, :, y, x]
        return z

    ends = []
    for branch, own in [(None, plan), *plan.tails]:
        z, pixels = NOISE.double().clone(), torch.arange(B)[:, None, None].expand(B, height, breadth).clone()
        context = CONTEXT
        for index in range(STEPS):
            ids = IDS[0] if branch is None or index < branch.step else branch.ids
            x0, eps = clean(index, z, context)
            if guided and index >= 2:
                found = chain(x0.float(), own.targets[index], torch.ones(B, dtype=torch.bool), torch.ones(3))
                size = 0.2 * x0.flatten(1).norm(dim=1) / found.norm.double()
                x0 = x0 - size[:, None, None, None] * found.gradient.double()
            z = take(down(index, x0, eps), own.partners[index], own.boxes[index])
            pixels = take(pixels, own.partners[index], own.boxes[index])
            if own.mixes[index]:
                context = told(pixels)
                z = mend(index, z, own.boxes[index], context, ids)
            if branch is not None and index + 1 == branch.step:
                z, pixels = take(z, branch.partners, branch.boxes), take(pixels, branch.partners, branch.boxes)
                context = told(pixels)
                z = mend(index, z, branch.boxes, context, branch.ids)
        ends.append(z)
    return torch.cat(ends).float()


BLEND: dict[str, object] = {"prompt": "blend"}
MASKED: dict[str, object] = {"repair": "masked", "band": 2, "passes": 2}


@pytest.mark.parametrize("fan_out", [1, M])
@pytest.mark.parametrize("fields", [BLEND, MASKED, {**BLEND, **MASKED}], ids=["blend", "masked", "both"])
def test_trajectories_are_those_of_the_naive_loop(fields: dict[str, object], fan_out: int) -> None:
    plan = planned(fan_out, **fields)
    found = run(plan)
    torch.testing.assert_close(found.latents, naive(plan, fields), atol=2e-4, rtol=1e-3)
    assert not torch.allclose(found.latents, run(planned(fan_out)).latents, atol=1e-2)
    assert torch.equal(run(plan, stage=Buffered()).latents, found.latents)


def test_who_is_whole_keeps_its_own_prompt_to_the_bit_and_the_callers_context_stays() -> None:
    before = CONTEXT.clone()
    blended, plain = run(planned(prompt="blend", probability=0.4), "none"), run(planned(probability=0.4), "none")
    assert torch.equal(CONTEXT, before)
    lineage = planned(probability=0.4).parents
    whole = [owner for owner, parents in enumerate(lineage) if not parents]
    mixed = [owner for owner, parents in enumerate(lineage) if parents]
    assert whole and mixed
    assert torch.equal(blended.latents[whole], plain.latents[whole])
    assert not torch.equal(blended.latents[mixed], plain.latents[mixed])


def test_shares_are_those_of_the_pixels() -> None:
    plan = planned(M, prompt="blend")
    labels = torch.nn.functional.one_hot(torch.arange(B) % CLASSES).float()
    assert sorted(plan.shares) == [2, 4]
    for own in (plan, plan.tails[0].plan):
        for step, shares in own.shares.items():
            torch.testing.assert_close(shares @ labels, own.targets[step])
    assert FORK in plan.tails[0].plan.shares


@pytest.mark.parametrize("passes", [1, 3])
def test_repair_leaves_what_is_outside_the_band_as_it_was(monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    from diffdfkd.engine import sampler

    plain, seen = sampler.repair_seams, []

    def watched(loop, z, alive, index, boxes, repair):  # type: ignore[no-untyped-def]
        before, after = z.clone(), plain(loop, z, alive, index, boxes, repair)
        seen.append((index, boxes, before, after))
        return after

    calls = []

    def counted(sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        calls.append(timestep[0].item())
        return unet(sample, timestep, context)

    monkeypatch.setattr(sampler, "repair_seams", watched)
    run(planned(repair="masked", passes=passes), "none", counted)
    assert [index for index, *_ in seen] == [1, 3] and len(calls) == STEPS + 2 * passes
    times = TABLE.timesteps.tolist()
    assert calls == [*times[:2], *times[1:2] * passes, *times[2:4], *times[3:4] * passes, *times[4:]]
    for _, boxes, before, after in seen:
        band = seam_band(boxes, 1, *LATENT[1:]).expand_as(before)
        assert band.any() and not band.all()
        assert torch.equal(after[~band], before[~band]) and not (after[band] == before[band]).any()


def test_a_band_lies_on_both_sides_of_the_seams_and_not_along_the_border() -> None:
    boxes = torch.tensor([[0, 0, 0, 0], [0, 0, 6, 8], [2, 3, 4, 6], [0, 4, 3, 8]], dtype=torch.int32)
    band = seam_band(boxes, 1, 6, 8)[:, 0].int()
    assert not band[:2].any()
    inner = box_mask(torch.tensor([[1, 2, 5, 7]]), 6, 8)[0, 0].int()
    assert torch.equal(band[2], inner)
    corner = torch.zeros(6, 8, dtype=torch.int32)
    corner[:4, 3:] = 1
    corner[:2, 5:] = 0
    assert torch.equal(band[3], corner)


@pytest.mark.parametrize("guided", [True, False])
def test_recorded_steps_go_the_same_way(guided: bool) -> None:
    def again(body):  # type: ignore[no-untyped-def]
        body()
        return body

    guidance = GuidanceRecipe.model_validate({"mode": "clean" if guided else "none", "rho": 0.2, "window": [0.2, 1.0]})
    for stage in (unet, Buffered()):
        captured = CapturedSampler(
            stage,
            TABLE,
            scale=SCALE,
            shape=(B, *LATENT),
            context=(2 * B, 3, 4),
            classes=CLASSES,
            seed=7,
            guidance=guidance,
            chain=chain if guided else None,
            kernel="reference",
            device=torch.device("cpu"),
            record=again,
        )
        for plan in (planned(M, **BLEND, **MASKED), planned(), planned(M, every=0), planned(**BLEND)):
            found, expected = captured(CONTEXT, NOISE, IDS[0], plan), run(plan, guidance.mode)
            for name in ("latents", "alive", "targets", "losses", "frozen"):
                torch.testing.assert_close(
                    getattr(found, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True
                )


@pytest.mark.parametrize("sampler", ["ddpm", "euler", "dpmsolver++", "lcm"])
def test_other_samplers_are_refused(sampler: str) -> None:
    content = {
        "prior": "p",
        "teacher": {"architecture": "small_cnn", "classes": ["a", "b"]},
        "student": {"architecture": "small_cnn"},
        "cutmix": {"every": 2, "repair": "masked"},
    }
    assert load_recipe(content).cutmix.repair == "masked"
    with pytest.raises(UserError, match=r"cutmix.repair: masked .* take synthesis.sampler=ddim"):
        load_recipe(content, [f"synthesis.sampler={sampler}"])
