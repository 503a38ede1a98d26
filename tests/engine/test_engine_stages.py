"""Every stage against the run's own eager form of it: engine/stages.py, and autograd for the gradient."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_stages import CLASSES, WEIGHTS, classifier, open_prior, prior_stage
from torch import Tensor, nn
from tracing import distance

from diffdfkd.engine.architectures import ARCHITECTURES
from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.engine_stages import Batches, Stage, student_weights, unet_engine_stage
from diffdfkd.engine.prior import Prior
from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.stages import decode_stage, guidance_chain, unet_stage
from diffdfkd.engine.taps import guidance_taps, tappable

F32, BF16 = torch.float32, torch.bfloat16
ADVERSARIAL = WEIGHTS.model_copy(update={"adversarial_weight": 0.5})
BATCHES = Batches(6)
PRECISIONS = [(F32, 1e-5), (BF16, 3e-2), (torch.float16, 1e-2)]


@pytest.fixture(scope="module")
def prior(tiny_prior: Path) -> Prior:
    return open_prior(tiny_prior)


def agree(stage: Stage, expected: tuple[Tensor, ...], inputs: tuple[Tensor, ...], tolerance: float) -> None:
    """In names, shapes and dtypes with the specification, in values with what is expected.

    The chain's gradient at low precision may be off by more: random weights make almost uniform images.
    """
    with torch.no_grad():
        given = stage.function(*inputs)
    for port, made, wanted in zip(stage.specification.outputs, given, expected, strict=True):
        assert (tuple(made.shape), made.dtype) == (port.shape, port.dtype) and not made.requires_grad
        rough = stage.name == "chain" and port.name in stage.gradients and tolerance > 1e-4
        assert distance(made.float(), wanted.float()) <= (0.35 if rough else tolerance), port.name


def check_examples(stage: Stage) -> None:
    """They fit any batch, differ by the seed, and are drawn again as they were."""
    specification = stage.specification
    for rows in (1, 6):
        given = stage.examples(rows, 3)
        assert [tuple(value.shape) for value in given] == [port.shape_at(rows) for port in specification.inputs]
        assert [value.dtype for value in given] == [port.dtype for port in specification.inputs]
        assert all(torch.equal(*pair) for pair in zip(given, stage.examples(rows, 3), strict=True))
        assert not torch.equal(given[0], stage.examples(rows, 4)[0])


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_unet_is_the_runs_own(prior: Prior, precision: torch.dtype, tolerance: float) -> None:
    stage = prior_stage("unet", prior, BATCHES, precision)
    check_examples(stage)
    inputs = stage.examples(6, 0)
    with torch.no_grad():
        agree(stage, (unet_stage(prior)(*inputs),), inputs, tolerance)
    timestep, context = inputs[1:]
    assert timestep.min() >= 0 and timestep.max() <= 999 and len(timestep.unique()) == 6
    assert len({tuple(row.flatten().tolist()) for row in context}) == 3  # all prompts take part


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_vjp_is_autograds(prior: Prior, precision: torch.dtype, tolerance: float) -> None:
    stage = prior_stage("vjp", prior, BATCHES, precision)
    check_examples(stage)
    sample, timestep, context, cotangent = inputs = stage.examples(6, 0)
    leaf = sample.clone().requires_grad_()
    output = unet_stage(prior)(leaf, timestep, context)
    (gradient,) = torch.autograd.grad(output, leaf, cotangent)
    agree(stage, (output.detach(), gradient), inputs, tolerance)
    assert not sample.requires_grad and sample.grad is None


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_decoder_is_the_runs_own(prior: Prior, precision: torch.dtype, tolerance: float) -> None:
    stage = prior_stage("decoder", prior, BATCHES, precision)
    check_examples(stage)
    inputs = stage.examples(6, 0)
    with torch.no_grad():
        agree(stage, (decode_stage(prior)(*inputs),), inputs, tolerance)


def eager_chain(
    prior: Prior,
    teacher: nn.Module,
    student: nn.Module | None = None,
    weights: GuidanceRecipe = WEIGHTS,
) -> Callable[..., Any]:
    taps = guidance_taps(teacher.model, weights) if weights.batchnorm_weight > 0 else None
    chain = guidance_chain(decode_stage(prior), teacher, taps, weights, student, kernel="reference")

    def made(*inputs: Tensor) -> Any:
        return chain(*inputs[:4])

    return made


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("terms", [{}, {"batchnorm_weight": 0.0}, {"class_weight": 0.0}], ids=str)
def test_chain_is_the_runs_own(prior: Prior, precision: torch.dtype, tolerance: float, terms: dict[str, float]) -> None:
    weights = WEIGHTS.model_copy(update=terms)
    stage = prior_stage("chain", prior, BATCHES, precision, weights=weights)
    check_examples(stage)
    inputs = stage.examples(6, 0)
    assert inputs[2].any() and not inputs[2].all()
    agree(stage, eager_chain(prior, classifier(), weights=weights)(*inputs), inputs, tolerance)


def test_statistics_are_not_rounded_with_the_networks(prior: Prior) -> None:
    """What bfloat16 would round away moves L_bn all the same: the distance is looked at in float32."""
    found = []
    for moved in (1.0, 1.001):
        teacher = classifier()
        for layer in tappable(teacher.model).values():
            layer.running_var.fill_(2.0 * moved)
        stage = prior_stage("chain", prior, BATCHES, BF16, teacher=teacher, weights=WEIGHTS)
        inputs = stage.examples(6, 0)
        by_statistics = [function(*inputs)[3][2] for function in (stage.function, stage.reference)]
        found.append(torch.stack(by_statistics))
    low, exact = (found[1] - found[0]).tolist()
    assert abs(exact) > 1e-4 and abs(low - exact) < 0.3 * abs(exact)


@pytest.mark.parametrize(
    "choice", [{"layers": ["features.[0-3].*"]}, {"layer_weights": "relative"}, {"statistics": "class"}], ids=str
)
def test_chain_with_other_statistics_is_the_runs_own(prior: Prior, choice: dict[str, Any]) -> None:
    weights = WEIGHTS.model_copy(update=choice)
    stage = prior_stage("chain", prior, BATCHES, weights=weights)
    inputs = stage.examples(6, 1)
    agree(stage, eager_chain(prior, classifier(), weights=weights)(*inputs), inputs, 1e-5)
    plain = prior_stage("chain", prior, BATCHES)
    assert distance(stage.function(*inputs)[0], plain.function(*inputs)[0]) > 1e-3


def test_weights_of_the_terms_are_an_input(prior: Prior) -> None:
    stage = prior_stage("chain", prior, BATCHES)
    inputs = stage.examples(6, 0)
    by_class, by_statistics, both = (
        stage.function(*inputs[:3], torch.tensor(shares))[0] for shares in ([2.0, 0, 0], [0, 0.5, 0], [2.0, 0.5, 0])
    )
    assert distance(by_class + by_statistics, both) <= 1e-5
    assert min(distance(each, both) for each in (by_class, by_statistics)) > 1e-2
    assert not torch.equal(*(stage.examples(6, seed)[3] for seed in (0, 1)))


def test_masked_samples_count_nowhere(prior: Prior) -> None:
    stage = prior_stage("chain", prior, BATCHES)
    x0, targets, alive, shares = stage.examples(6, 1)
    alive[:] = True
    alive[2] = False
    x0[2], x0[5] = 1e30, float("nan")
    whole = torch.tensor([0, 1, 3, 4])
    gradient, norm, finite, losses = stage.function(x0, targets, alive, shares)
    alone = eager_chain(prior, classifier())(x0[whole], targets[whole], alive[whole], shares)
    assert finite.tolist() == [True, True, False, True, True, False]
    assert not gradient[~finite].any() and not norm[~finite].any()
    assert distance(gradient[whole], alone.gradient) <= 1e-5
    assert distance(norm[whole], alone.norm) <= 1e-5
    assert distance(losses, alone.losses) <= 1e-5


def softened(factor: float, seed: int = 1) -> Classifier:
    """As the teacher, but less sure: both name the same class everywhere, so that the student's term acts."""
    student = classifier(seed=seed)
    student.model.head.weight.mul_(factor)
    student.model.head.bias.mul_(factor)
    return student


@pytest.mark.parametrize("precision", [F32, BF16])
def test_student_is_an_input(prior: Prior, precision: torch.dtype) -> None:
    teacher, first, second = classifier(), softened(0.2), softened(0.6)
    stage = prior_stage("chain", prior, BATCHES, precision, teacher=teacher, student=first, weights=ADVERSARIAL)
    check_examples(stage)
    inputs = stage.examples(6, 0)
    assert len(inputs) == 4 + len(student_weights(first))
    own = (*inputs[:4], *student_weights(first).values())
    made = {}
    for student in (first, second):
        given = (*inputs[:4], *student_weights(student).values())
        expected = eager_chain(prior, teacher, student, ADVERSARIAL)(*given)
        agree(stage, expected, given, 1e-5 if precision == F32 else 3e-2)
        made[student] = expected
    assert distance(made[first].gradient, made[second].gradient) > 1e-4
    assert made[first].losses[3] < made[second].losses[3] < 0
    # Its own weights are still what they were, and nothing of a call is held.
    agree(stage, made[first], own, 1e-5 if precision == F32 else 3e-2)


def test_chain_has_no_student_where_its_term_has_no_weight(prior: Prior) -> None:
    plain, given = (
        prior_stage("chain", prior, BATCHES),
        prior_stage("chain", prior, BATCHES, student=classifier(seed=2)),
    )
    assert len(given.specification.inputs) == 4
    assert plain.digest == given.digest
    unknown = prior_stage("chain", prior, BATCHES, weights=ADVERSARIAL)  # the first round has no student
    assert unknown.digest == plain.digest


def digest(name: str, prior: Prior, precision: torch.dtype = F32, **options: Any) -> str:
    return prior_stage(name, prior, BATCHES, precision, **options).digest


def changed(prior: Prior, component: str) -> Prior:
    """The same prior but for the last bits of a few weights."""
    other = copy.copy(prior)
    network = copy.deepcopy(getattr(prior, component))
    first = next(network.parameters()).data[:1]
    first.copy_(torch.nextafter(first, torch.tensor(torch.inf)))
    setattr(other, component, network)
    return other


def test_digest_depends_on_the_networks_that_a_stage_has(prior: Prior) -> None:
    reached = {"unet": {"unet"}, "vjp": {"unet"}, "decoder": {"vae"}, "chain": {"vae"}}
    digests = {name: digest(name, prior) for name in reached}
    assert len({*digests.values()}) == len(digests)
    for component in ("unet", "vae", "text_encoder"):
        other = changed(prior, component)
        for name, networks in reached.items():
            assert (digest(name, other) != digests[name]) == (component in networks), (component, name)


def test_digest_depends_on_precision_and_settings(prior: Prior) -> None:
    for name in ("unet", "vjp", "decoder", "chain"):
        digests = {digest(name, prior, precision) for precision in (F32, BF16, torch.float16)}
        assert len(digests) == 3
        # Batches are the specification's.
        assert prior_stage(name, prior, Batches(2, 1, 3)).digest == digest(name, prior)
    scaled = copy.copy(prior)
    scaled.scaling_factor *= 2
    assert digest("decoder", scaled) != digest("decoder", prior)
    assert digest("chain", scaled) != digest("chain", prior)
    assert digest("unet", scaled) == digest("unet", prior)


def test_digest_of_a_chain_depends_on_teacher_and_terms(prior: Prior) -> None:
    plain = digest("chain", prior)
    assert digest("chain", prior, teacher=classifier()) == plain
    others: list[dict[str, Any]] = [
        {"teacher": classifier(seed=2)},
        {"teacher": classifier(size=20)},
        {"weights": WEIGHTS.model_copy(update={"batchnorm_weight": 0.0})},
        {"weights": WEIGHTS.model_copy(update={"layers": ["features.[0-3].*"]})},
        {"weights": WEIGHTS.model_copy(update={"layer_weights": "relative"})},
        {"weights": WEIGHTS.model_copy(update={"statistics": "class"})},
        {"weights": ADVERSARIAL, "student": classifier(seed=2)},
    ]
    digests = {digest("chain", prior, **other) for other in others}
    assert len(digests) == len(others) and plain not in digests
    # What the terms weigh is an input, and what the sampler does with the gradient is no part of it.
    same = {"class_weight": 0.9, "batchnorm_weight": 0.31, "class_window": (0.0, 0.5), "rho": 0.5, "every": 2}
    assert digest("chain", prior, weights=WEIGHTS.model_copy(update=same)) == plain


def test_digest_of_a_chain_knows_the_students_architecture_alone(prior: Prior) -> None:
    def of(student: Any, weights: GuidanceRecipe = ADVERSARIAL) -> str:
        return digest("chain", prior, student=student, weights=weights)

    first = of(classifier(width=3, seed=2))
    assert of(classifier(width=3, seed=3)) == first
    assert of(classifier(width=2, seed=2)) != first
    # The same weights in another order of layers are another network.
    other = classifier(width=3, seed=2)
    other.model = nn.Sequential(other.model, nn.Softmax(1))
    assert of(other) != first
    assert of(classifier(width=3, seed=2), ADVERSARIAL.model_copy(update={"adversarial_weight": 0.4})) == first


def test_stages_leave_the_networks_alone(prior: Prior) -> None:
    teacher, student = classifier(), classifier(width=3, seed=2)
    networks = [prior.unet, prior.vae, teacher, student]
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    chain = eager_chain(prior, teacher)
    inputs = prior_stage("chain", prior, BATCHES).examples(6, 0)
    gradient = chain(*inputs).gradient
    for name in ("unet", "vjp", "decoder", "chain"):
        stage = prior_stage(name, prior, BATCHES, BF16, teacher=teacher, student=student, weights=ADVERSARIAL)
        stage.function(*stage.examples(6, 0))
        stage.reference(*stage.examples(6, 0))
    # Nor do they disturb who taps the teacher meanwhile.
    assert torch.equal(chain(*inputs).gradient, gradient)
    for network, state in zip(networks, before, strict=True):
        for key, value in network.state_dict().items():
            assert value.dtype == state[key].dtype and torch.equal(value, state[key])
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())


def test_a_bfloat16_prior_has_a_float32_reference(tiny_prior: Path) -> None:
    rounded = open_prior(tiny_prior, "bfloat16")
    stage = prior_stage("unet", rounded, BATCHES, BF16)
    inputs = stage.examples(6, 0)
    exact = copy.copy(rounded)
    exact.unet = copy.deepcopy(rounded.unet).float()
    with torch.no_grad():
        expected = unet_stage(exact)(*inputs)
        assert distance(stage.reference(*inputs)[0], expected) <= 1e-5
        assert 1e-4 < distance(stage.function(*inputs)[0], expected) < 3e-2


def test_functions_are_made_once(prior: Prior) -> None:
    stage = prior_stage("chain", prior, BATCHES, BF16)
    assert stage.function is stage.function and stage.reference is stage.reference
    assert stage.function is not stage.reference
    assert stage.device == torch.device("cpu") and stage.name == "chain"


@pytest.fixture(scope="module")
def told(prior_builder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Prior:
    """As a distilled latent consistency model: its UNet is told the guidance scale."""
    return open_prior(prior_builder(tmp_path_factory.mktemp("lcm") / "lcm", unet={"time_cond_proj_dim": 32}))


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_unet_that_is_told_the_scale(told: Prior, scale: float) -> None:
    context = told.embed(CLASSES[:2])
    stage = unet_engine_stage(told, BATCHES, context, F32, scale)
    inputs = stage.examples(6, 0)
    with torch.no_grad():
        agree(stage, (unet_stage(told, guidance_scale=scale)(*inputs),), inputs, 1e-5)
        low = unet_engine_stage(told, BATCHES, context, BF16, scale)
        assert distance(low.function(*inputs)[0], stage.function(*inputs)[0]) <= 3e-2


def test_scale_is_in_the_digest_of_a_unet_that_is_told_it(told: Prior, prior: Prior) -> None:
    for which, differs in ((told, True), (prior, False)):
        context = which.embed(CLASSES[:2])
        digests = {unet_engine_stage(which, BATCHES, context, F32, scale).digest for scale in (1.0, 7.5)}
        assert (len(digests) == 2) == differs


def test_batches_in_rows_of_a_doubled_unet() -> None:
    assert Batches(3, 1, 5).rows(2) == Batches(6, 2, 10)
    assert Batches(3).rows(2) == Batches(6)
    assert Batches(3, 1).rows(1) == Batches(3, 1)


def test_networks_of_other_kinds(prior: Prior) -> None:
    """A student whose state has counters and whose answer depends on buffers; colour from a grey prior."""
    teacher = classifier(3)
    student = classifier(3, seed=5)
    student.model = ARCHITECTURES["mobilenet_v2"](channels=3, classes=len(CLASSES)).eval().requires_grad_(False)
    stage = prior_stage("chain", prior, BATCHES, teacher=teacher, student=student, weights=ADVERSARIAL)
    inputs = (*stage.examples(6, 0)[:4], *student_weights(student).values())
    agree(stage, eager_chain(prior, teacher, student, ADVERSARIAL)(*inputs), inputs, 1e-5)
    moved = [value + 0.1 * torch.rand_like(value) for value in inputs[4:]]
    names = list(student_weights(student))
    student.model.load_state_dict({**student.model.state_dict(), **dict(zip(names, moved, strict=True))})
    agree(stage, eager_chain(prior, teacher, student, ADVERSARIAL)(*inputs), (*inputs[:4], *moved), 1e-5)
