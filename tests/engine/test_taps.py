import copy

import pytest
import torch
from torch import nn

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.taps import BatchNormTaps, check_taps


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.LazyLinear(5),
        nn.BatchNorm1d(5, affine=False),
        nn.BatchNorm1d(5, track_running_stats=False),
    ).eval()


def test_taps_give_the_inputs_of_the_layers_inside_the_graph() -> None:
    model = network()
    images = torch.randn(2, 1, 9, 9, requires_grad=True)
    with BatchNormTaps(model) as taps:
        model(images)
        assert taps.names == ["1", "4", "7"]
        for name, kept in zip(taps.names, taps.inputs, strict=True):
            assert torch.equal(kept, model[: int(name)](images))
        (gradient,) = torch.autograd.grad(torch.stack([kept.square().mean() for kept in taps.inputs]).sum(), images)
        assert gradient.abs().sum() > 0
        assert [mean.shape[0] for mean in taps.running_means] == [3, 4, 5]
        assert taps.running_variances[1] is model[4].running_var
        model(images * 2)
        assert torch.equal(taps.inputs[0], model[0](images * 2))
        taps.clear()
        with pytest.raises(UserError, match="1, 4, 7 took no part"):
            _ = taps.inputs
    model(images)
    with pytest.raises(UserError, match="took no part"):
        _ = taps.inputs


def test_a_copy_in_half_precision_is_held_to_whole_statistics() -> None:
    model = network()
    model(torch.randn(2, 1, 9, 9))  # the lazy layer
    model[1].running_mean.fill_(1.001)
    lowered = copy.deepcopy(model).to(torch.bfloat16)
    with BatchNormTaps(lowered, model) as taps:
        lowered(torch.randn(2, 1, 9, 9, dtype=torch.bfloat16))
        assert all(kept.dtype == torch.bfloat16 for kept in taps.inputs)
        assert torch.equal(taps.running_means[0], torch.full((3,), 1.001))
        assert taps.running_variances[1] is model[4].running_var
    with BatchNormTaps(lowered) as taps:
        assert torch.equal(taps.running_means[0], torch.ones(3, dtype=torch.bfloat16))


def test_a_model_without_batchnorm_is_refused() -> None:
    with pytest.raises(UserError, match=r"guidance.batchnorm_weight: the teacher has no BatchNorm"):
        BatchNormTaps(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)))


def test_a_layer_left_out_of_the_forward_is_named() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(1), nn.BatchNorm2d(1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.used(images)

    model = Auxiliary()
    taps = BatchNormTaps(model)
    model(torch.zeros(2, 1, 3, 3))
    with pytest.raises(UserError, match="layers unused took no part"):
        _ = taps.inputs


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        (nn.GroupNorm(1, 2), "the teacher has no BatchNorm layer with running statistics, as a ViT or ConvNeXt has"),
        (nn.BatchNorm2d(2, track_running_stats=False), "BatchNorm layers keep no running statistics"),
    ],
)
def test_a_teacher_without_statistics_guides_by_its_class_loss_with_a_warning(
    layer: nn.Module, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), layer)
    with pytest.raises(UserError, match=rf"guidance.batchnorm_weight: .*{line}.*; set it to 0"):
        check_taps(model, GuidanceRecipe())
    check_taps(model, GuidanceRecipe(mode="none"))
    assert not caplog.records
    check_taps(model, GuidanceRecipe(batchnorm_weight=0.0))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "class loss guides alone" in caplog.text and "docs/method.md" in caplog.text
    caplog.clear()
    check_taps(network(), GuidanceRecipe(batchnorm_weight=0.0))
    check_taps(network(), GuidanceRecipe())
    assert not caplog.records


def test_an_input_that_is_written_over_is_found() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            hidden = images * 2
            normed = self.bn(hidden)
            hidden.relu_()
            return normed + hidden

    model = Overwriting().eval().requires_grad_(False)
    with BatchNormTaps(model) as taps:
        model(torch.randn(2, 1, 3, 3, requires_grad=True))
        with pytest.raises(UserError, match=r"teacher.architecture: the input of BatchNorm layer bn is written over"):
            _ = taps.inputs
        with torch.inference_mode():
            model.bn(torch.randn(2, 1, 3, 3))
            assert len(taps.inputs) == 1


def settled() -> nn.Sequential:
    """`network` with all its layers made."""
    model = network()
    model(torch.randn(2, 1, 9, 9))
    return model


def test_layers_are_chosen_by_names_and_patterns() -> None:
    model = settled()
    with BatchNormTaps(model, layers=["7", "[14]"]) as taps:
        assert taps.names == ["1", "4", "7"] and taps.factors is None
    with BatchNormTaps(copy.deepcopy(model), model, layers=["4"]) as taps:
        model(torch.randn(2, 1, 9, 9))  # not the copy
        assert taps.names == ["4"] and taps.running_means[0] is model[4].running_mean
    with pytest.raises(UserError, match=r"guidance.layers: 'head.\*' matches none .*; they are 1, 4, 7$"):
        check_taps(model, GuidanceRecipe(layers=["1", "head.*"]))
    check_taps(model, GuidanceRecipe(layers=["head"], batchnorm_weight=0.0))


def test_what_a_layer_counts() -> None:
    model = settled()
    for index, layer in enumerate((model[1], model[4], model[7])):
        layer.running_mean.fill_(index + 0.5)
        layer.running_var.fill_(2.0)
    sizes = [3, 4, 5]
    with BatchNormTaps(model, layer_weights="relative") as taps:
        expected = [[1 / ((i + 0.5) * size**0.5), 1 / (2 * size**0.5)] for i, size in enumerate(sizes)]
        torch.testing.assert_close(taps.factors, torch.tensor(expected))
    with BatchNormTaps(model, layers=["7", "1"], layer_weights=[0.5, 3.0]) as taps:
        assert taps.names == ["1", "7"] and taps.factors is not None
        assert taps.factors.tolist() == [[0.5, 0.5], [3.0, 3.0]]
    with pytest.raises(UserError, match=r"guidance.layer_weights: got 2 numbers for 3 BatchNorm layers \(1, 4, 7\)"):
        check_taps(model, GuidanceRecipe(layer_weights=[1.0, 2.0]))
    model[4].running_mean.zero_()
    with pytest.raises(UserError, match=r"guidance.layer_weights: relative, but BatchNorm layer 4 .* zeros"):
        check_taps(model, GuidanceRecipe(layer_weights="relative"))
    check_taps(model, GuidanceRecipe(layer_weights="relative", layers=["1", "7"]))
