import pytest
import torch

from diffdfkd.engine.cutmix import beta_quantile, mixed_steps, plan_cutmix
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import CutMixRecipe
from diffdfkd.kernels.box import box_mask, box_share

BATCH, CLASSES, STEPS, SIZE = 24, 4, 10, (8, 6)


def plan(seed=3, first=0, classes=None, **fields):
    recipe = CutMixRecipe(**{"every": 2, "probability": 1.0, "partner": "any", **fields})
    classes = torch.arange(BATCH) % CLASSES if classes is None else classes
    return plan_cutmix(recipe, classes, CLASSES, STEPS, SIZE, seed, torch.arange(len(classes)) + first)


def mixed(made):
    return made.partners != torch.arange(made.partners.shape[1])


def test_acts_after_each_nth_step_but_never_after_the_last():
    assert mixed_steps(CutMixRecipe(every=2), 10) == [1, 3, 5, 7]
    assert mixed_steps(CutMixRecipe(every=3), 10) == [2, 5, 8]
    assert mixed_steps(CutMixRecipe(every=0), 10) == []
    assert [step for step, mixes in enumerate(plan().mixes) if mixes] == [1, 3, 5, 7]


def test_refuses_an_interval_that_would_never_mix():
    with pytest.raises(UserError, match=r"cutmix\.every: got 10 .* 9 or less"):
        mixed_steps(CutMixRecipe(every=10), 10)


@pytest.mark.parametrize("fields", [{"every": 0}, {"probability": 0.0}])
def test_off_mixes_nobody(fields):
    made = plan(**fields)
    assert not mixed(made).any() and not any(made.mixes) and not made.boxes.any()
    assert all(parents == () for parents in made.parents)
    assert torch.equal(made.targets, torch.eye(CLASSES)[torch.arange(BATCH) % CLASSES].expand(STEPS + 1, -1, -1))


def test_probability_is_the_share_of_mixed_samples():
    acted = [1, 3, 5, 7]
    # A draw can round to an empty box, so that certainty still leaves a few samples whole.
    assert mixed(plan(probability=1.0))[acted].float().mean() > 0.9
    half = torch.cat([mixed(plan(seed=seed, probability=0.5))[acted] for seed in range(10)]).float().mean()
    assert 0.4 < half < 0.6


@pytest.mark.parametrize("rule", ["within", "across", "any"])
def test_partners_obey_their_rule_and_are_never_oneself(rule):
    made = plan(partner=rule)
    classes = torch.arange(BATCH) % CLASSES
    for step, owner in mixed(made).nonzero().tolist():
        partner = int(made.partners[step, owner])
        same = bool(classes[partner] == classes[owner])
        assert partner != owner and (rule == "any" or same == (rule == "within"))
    assert mixed(made).any()


def test_any_chooses_all_other_samples_alike():
    classes = torch.zeros(5, dtype=torch.int64)
    seen = torch.zeros(5, 5)
    for seed in range(100):
        made = plan(seed=seed, classes=classes)
        for step, owner in mixed(made).nonzero().tolist():
            seen[owner, made.partners[step, owner]] += 1
    shares = seen / seen.sum(1, keepdim=True)
    assert shares.diagonal().sum() == 0
    assert (shares + torch.eye(5) / 4).sub(0.25).abs().max() < 0.1


def test_within_and_across_leave_whole_who_has_no_partner():
    assert not mixed(plan(partner="within", classes=torch.arange(4)))[:, :4].any()
    assert not mixed(plan(partner="across", classes=torch.zeros(6, dtype=torch.int64))).any()


def test_a_label_is_the_share_of_pixels_that_each_class_owns():
    made = plan(partner="across")
    classes = torch.arange(BATCH) % CLASSES
    images = classes[:, None, None].expand(BATCH, *SIZE).clone()  # what each pixel is, painted by hand
    for step in range(STEPS):
        shares = torch.stack([(images == label).flatten(1).float().mean(1) for label in range(CLASSES)], 1)
        torch.testing.assert_close(made.targets[step], shares)
        before = images.clone()
        for owner in range(BATCH):
            top, left, bottom, right = made.boxes[step, owner].tolist()
            images[owner, top:bottom, left:right] = before[made.partners[step, owner], top:bottom, left:right]
    shares = torch.stack([(images == label).flatten(1).float().mean(1) for label in range(CLASSES)], 1)
    torch.testing.assert_close(made.targets[-1], shares)
    torch.testing.assert_close(made.targets.sum(2), torch.ones(STEPS + 1, BATCH))


def test_one_mix_weighs_the_label_by_the_area_of_its_box():
    made = plan(every=9, partner="across")
    share = box_share(made.boxes[8], *SIZE).float()
    classes = torch.arange(BATCH) % CLASSES
    for owner in mixed(made)[8].nonzero().flatten().tolist():
        partner = made.partners[8, owner]
        assert made.targets[-1, owner, classes[owner]] == pytest.approx(1 - float(share[owner]))
        assert made.targets[-1, owner, classes[partner]] == pytest.approx(float(share[owner]))


def test_within_a_class_the_label_stays():
    made = plan(partner="within")
    assert torch.equal(made.targets[-1], made.targets[0])


def test_parents_name_step_global_partner_box_and_area():
    made = plan(first=1000)
    count = 0
    for owner, parents in enumerate(made.parents):
        for parent in parents:
            assert parent.partner == int(made.partners[parent.step, owner]) + 1000
            assert list(parent.box) == made.boxes[parent.step, owner].tolist()
            mask = box_mask(made.boxes[parent.step], *SIZE)[owner]
            assert parent.area == pytest.approx(mask.float().mean().item()) and parent.area > 0
            count += 1
    assert count == int(mixed(made).sum())


def test_is_a_pure_function_of_seed_and_sample_ids():
    torch.manual_seed(0)
    first = plan()
    torch.manual_seed(1)
    torch.rand(7)
    state = torch.get_rng_state()
    again = plan()
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("partners", "boxes", "targets"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert first.parents == again.parents
    assert not torch.equal(first.boxes, plan(seed=4).boxes)
    assert not torch.equal(first.boxes, plan(first=BATCH).boxes)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 40.0])
def test_beta_quantile_has_the_moments_of_beta(alpha):
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    values = beta_quantile(uniform, alpha)
    assert values.diff().min() >= 0 and values.min() >= 0 and values.max() <= 1
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))  # central, of Beta(a, a)
    centred = values - 0.5
    assert values.mean().item() == pytest.approx(0.5, abs=1e-9)
    assert centred.square().mean().item() == pytest.approx(variance, rel=2e-3)
    assert centred.pow(4).mean().item() == pytest.approx(fourth, rel=4e-3)


def test_beta_quantile_of_alpha_one_is_uniform():
    uniform = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(beta_quantile(uniform, 1.0), uniform)
