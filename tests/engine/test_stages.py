import pytest
import torch
from small_chain import CLASSES, LATENT, WEIGHTS, Decoder, batch, classifier
from torch import nn
from torch.nn import functional

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.prior import load_prior
from diffdfkd.engine.recipe import GuidanceRecipe, PriorRecipe
from diffdfkd.engine.stages import (
    chain_specification,
    decode_stage,
    guidance_chain,
    unet_specification,
    unet_stage,
)
from diffdfkd.engine.taps import BatchNormTaps
from diffdfkd.kernels.moments import batch_moments


@pytest.fixture
def decoder():
    torch.manual_seed(5)
    return Decoder().double().requires_grad_(False)


@pytest.fixture
def teacher():
    return classifier(1)


@pytest.fixture
def student(teacher):
    # The teacher with softened logits: both name the same class everywhere, so that L_adv acts and is smooth.
    soft = classifier(1)
    soft[-1].weight.mul_(0.3)
    soft[-1].bias.mul_(0.3)
    return soft


def plain_loss(x0, targets, decoder, teacher, student, weights):
    """B * L as METHOD states it, without masks, closed forms or stages."""
    images = decoder(x0)
    inputs = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        for layer in teacher
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    logits = teacher(images)
    for hook in hooks:
        hook.remove()
    norms = [layer for layer in teacher if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    by_statistics = torch.zeros((), dtype=x0.dtype)
    for layer, given in zip(norms, inputs, strict=True):
        columns = given.transpose(0, 1).reshape(given.shape[1], -1)
        by_statistics = by_statistics + (columns.mean(1) - layer.running_mean).norm()
        by_statistics = by_statistics + (columns.var(1, unbiased=False) - layer.running_var).norm()
    by_class = functional.cross_entropy(logits, targets)
    replies, constant = student(images), logits.detach()
    agree = (constant.argmax(1) == replies.argmax(1)).to(x0.dtype)
    divergence = functional.kl_div(replies.log_softmax(1), constant.softmax(1), reduction="none").sum(1)
    by_student = -(divergence * agree).mean()
    total = weights.class_weight * by_class + weights.batchnorm_weight * by_statistics
    total = total + weights.adversarial_weight * by_student
    return total * len(x0), torch.stack([total, by_class, by_statistics, by_student])


@pytest.mark.parametrize("n", [1, 2, 7])
def test_gradient_and_losses_are_those_of_the_plain_formulation(n, decoder, teacher, student):
    x0, targets, alive = batch(n)
    made = guidance_chain(decoder, teacher, BatchNormTaps(teacher), WEIGHTS, student)(x0, targets, alive)
    leaf = x0.clone().requires_grad_()
    loss, losses = plain_loss(leaf, targets, decoder, teacher, student, WEIGHTS)
    (expected,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(made.gradient, expected)
    torch.testing.assert_close(made.norm, expected.flatten(1).norm(dim=1))
    torch.testing.assert_close(made.losses, losses.detach())
    assert made.losses[3] < 0
    assert made.finite.all()


def test_gradient_is_the_slope_of_the_loss(decoder, teacher):
    x0, targets, alive = batch(3)
    weights = GuidanceRecipe(class_weight=1.0, batchnorm_weight=0.5)
    chain = guidance_chain(decoder, teacher, BatchNormTaps(teacher), weights)
    gradient = chain(x0, targets, alive).gradient
    direction = torch.randn_like(x0)
    width = 1e-5
    ahead, behind = (chain(x0 + sign * width * direction, targets, alive).losses[0] for sign in (1, -1))
    slope = len(x0) * (ahead - behind) / (2 * width)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-9)


def test_a_sample_feels_its_class_loss_whatever_the_batch(decoder, teacher):
    x0, targets, alive = batch(6)
    chain = guidance_chain(decoder, teacher, None, GuidanceRecipe(class_weight=1.0, batchnorm_weight=0.0))
    whole = chain(x0, targets, alive).gradient
    for i in range(6):
        alone = chain(x0[i : i + 1], targets[i : i + 1], alive[i : i + 1]).gradient
        torch.testing.assert_close(whole[i : i + 1], alone)


def check_absent(made, chain, x0, targets, absent):
    """The others get what they would get in a batch without the absent ones."""
    rest = ~absent
    expected = chain(x0[rest], targets[rest], torch.ones(int(rest.sum()), dtype=torch.bool))
    torch.testing.assert_close(made.gradient[rest], expected.gradient)
    torch.testing.assert_close(made.losses, expected.losses)
    assert made.losses.isfinite().all() and made.finite[rest].all() and not made.finite[absent].any()
    assert not made.gradient[absent].any() and not made.norm[absent].any()


def test_dead_and_nan_samples_count_nowhere(decoder, teacher, student):
    x0, targets, alive = batch(6)
    x0[1, 0, 2, 3] = float("nan")
    x0[2] = float("inf")
    alive[4] = False
    x0[4] = float("nan")
    absent = torch.tensor([False, True, True, False, True, False])
    chain = guidance_chain(decoder, teacher, BatchNormTaps(teacher), WEIGHTS, student)
    check_absent(chain(x0, targets, alive), chain, x0, targets, absent)


@pytest.mark.parametrize("where", ["image", "logits", "gradient"])
def test_a_network_that_fails_on_one_sample_leaves_the_others_alone(where, decoder, teacher):
    x0, targets, alive = batch(5)
    x0[3, 0, 0, 0] = 100.0  # what the broken network stumbles over
    absent = torch.tensor([False, False, False, True, False])

    def fail(values, bad):
        return torch.where(bad.view(-1, *[1] * (values.dim() - 1)), torch.full_like(values, torch.nan), values)

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, latents):
            ctx.save_for_backward(latents)
            return latents.clone()

        @staticmethod
        def backward(ctx, gradient):
            (latents,) = ctx.saved_tensors
            return fail(gradient, latents[:, 0, 0, 0] > 50)

    bad_latents = {}

    def decode(latents):
        bad_latents["now"] = latents[:, 0, 0, 0] > 50
        if where == "gradient":
            latents = Slope.apply(latents)
        images = decoder(latents)
        return fail(images, bad_latents["now"]) if where == "image" else images

    class Broken(nn.Module):
        def forward(self, images):
            logits = teacher(images)
            return fail(logits, bad_latents["now"]) if where == "logits" else logits

    chain = guidance_chain(decode, Broken().eval(), BatchNormTaps(teacher), GuidanceRecipe(batchnorm_weight=0.3))
    made = chain(x0, targets, alive)
    if where == "gradient":
        # Its loss is sound, so it counts for the others; it alone cannot be guided.
        assert made.finite.tolist() == (~absent).tolist() and made.gradient.isfinite().all()
        assert not made.gradient[3].any()
    else:
        check_absent(made, chain, x0, targets, absent)


def test_nobody_alive_gives_no_gradient_and_finite_losses(decoder, teacher):
    x0, targets, alive = batch(2)
    chain = guidance_chain(decoder, teacher, BatchNormTaps(teacher), GuidanceRecipe())
    made = chain(x0 * float("nan"), targets, ~alive)
    assert not made.gradient.any() and not made.finite.any() and made.losses.isfinite().all()


def test_following_the_gradient_lowers_every_term(decoder, teacher):
    home, targets, alive = batch(8)
    with BatchNormTaps(teacher) as taps:
        teacher(decoder(home))
        for layer, given in zip((teacher[1], teacher[6]), taps.inputs, strict=True):
            mean, variance = batch_moments(given, alive)
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
    x0 = -2 * home
    chain = guidance_chain(decoder, teacher, BatchNormTaps(teacher), GuidanceRecipe(batchnorm_weight=1.0))
    losses = []
    for _ in range(20):
        made = chain(x0, targets, alive)
        losses.append(made.losses)
        x0 = x0 - 0.1 * x0.flatten(1).norm(dim=1)[:, None, None, None] * made.gradient / made.norm[:, None, None, None]
    total, by_class, by_statistics, _ = losses[-1] / losses[0]
    assert total < 0.6 and by_class < 1 and by_statistics < 0.6


def test_holds_no_graph_and_leaves_no_weight_gradient(decoder, teacher):
    x0, targets, alive = batch(2)
    taps = BatchNormTaps(teacher)
    student = classifier(3).requires_grad_(True)
    made = guidance_chain(decoder, teacher, taps, WEIGHTS, student)(x0.requires_grad_(), targets, alive)
    assert not any(result.requires_grad for result in made) and x0.grad is None
    assert all(parameter.grad is None for parameter in student.parameters())
    assert all(kept is None for kept in taps._inputs)


def test_bfloat16_chain_points_the_same_way(decoder, teacher):
    x0, targets, alive = batch(16, torch.float32)
    decoder, teacher = decoder.float(), teacher.float()
    taps = BatchNormTaps(teacher)
    exact = guidance_chain(decoder, teacher, taps, GuidanceRecipe())(x0, targets, alive)
    rough = guidance_chain(decoder, teacher, taps, GuidanceRecipe(), dtype=torch.bfloat16)(x0, targets, alive)
    assert rough.gradient.dtype == rough.losses.dtype == torch.float32
    assert not torch.equal(rough.gradient, exact.gradient)
    cosine = functional.cosine_similarity(exact.gradient.flatten(1), rough.gradient.flatten(1))
    assert cosine.min() > 0.98
    torch.testing.assert_close(rough.losses, exact.losses, rtol=0.05, atol=0.02)


def test_refuses_networks_in_training_mode_and_guidance_without_a_term(decoder, teacher):
    with pytest.raises(ValueError, match="eval mode"):
        guidance_chain(decoder, classifier(1).train(), None, GuidanceRecipe())
    alone = GuidanceRecipe(class_weight=0.0, batchnorm_weight=0.0, adversarial_weight=1.0)
    with pytest.raises(UserError, match="no student exists yet"):
        guidance_chain(decoder, teacher, None, alone)


def test_weights_of_a_call_are_those_of_the_recipe_to_the_bit(decoder, teacher, student):
    given = batch(5, torch.float32)
    networks = [network.float() for network in (decoder, teacher, student)]
    chain = guidance_chain(*networks[:2], BatchNormTaps(teacher), WEIGHTS, student)
    plain, told = chain(*given), chain(*given, torch.tensor([0.7, 0.3, 0.5]))
    assert all(torch.equal(a, b) for a, b in zip(plain, told, strict=True))
    other = chain(*given, torch.tensor([0.7, 0.3, 0.0]))
    assert not torch.equal(other.gradient, told.gradient) and torch.equal(other.losses[1:], told.losses[1:])


def check_ports(ports, tensors):
    for port, tensor in zip(ports, tensors, strict=True):
        assert (port.shape, port.dtype) == (tuple(tensor.shape), tensor.dtype), port.name


def test_chain_keeps_to_its_specification(decoder, teacher):
    given = batch(4, torch.float32)
    specification = chain_specification(LATENT, 4, CLASSES)
    given = (*given, torch.tensor([1.0, 0.0, 0.0]))
    check_ports(specification.inputs, given)
    chain = guidance_chain(decoder.float(), teacher.float(), None, GuidanceRecipe(batchnorm_weight=0.0))
    check_ports(specification.outputs, chain(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unet_and_decoder_keep_to_their_specification(tiny_prior, dtype):
    prior = load_prior(PriorRecipe(path=str(tiny_prior), dtype=str(dtype).removeprefix("torch.")), torch.device("cpu"))
    context = prior.embed(["a", "b"]).float()
    specification = unet_specification(prior.latent_shape, 2, *context.shape[1:])
    sample, timestep = torch.randn(2, *prior.latent_shape), torch.tensor([900.0, 900.0])
    check_ports(specification.inputs, (sample, timestep, context))
    with torch.no_grad():
        output = unet_stage(prior, dtype)(sample, timestep, context)
        plain_prior = load_prior(PriorRecipe(path=str(tiny_prior)), torch.device("cpu"))
        exact = plain_prior.unet(sample, timestep, encoder_hidden_states=context).sample
        images = decode_stage(prior, dtype)(sample)
        plain = plain_prior.decode(sample)
    check_ports(specification.outputs, [output])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(output, exact, **tolerance)
    torch.testing.assert_close(images, plain, **tolerance)
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
    if dtype == torch.bfloat16:
        assert not torch.equal(output, exact)
