"""The table, operator by operator; test_traced_stages.py asks whole stages."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from tracing import assert_same, check_operator, distance, operators, traced, vjp

from diffdfkd.engine.decompositions import decompositions, whole_resizing
from diffdfkd.engine.normalization import group_norm_backward, layer_norm, layer_norm_backward

aten = torch.ops.aten

# stride, padding, dilation, groups, kernel
CONVOLUTIONS = [
    (1, 1, 1, 1, 3),
    (2, 1, 1, 2, 3),
    (1, 0, 1, 4, 1),
    (2, 0, 1, 1, 1),
    (1, 2, 2, 1, 3),
    (3, 1, 2, 2, 4),
    (2, 3, 1, 1, 7),
    ((2, 1), (1, 0), (1, 2), 1, (3, 2)),
]
ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu by tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "hardswish": functional.hardswish,
    "hardtanh": functional.hardtanh,
    "relu6": functional.relu6,
    "relu in place": lambda x: functional.relu_(x * 1.0),
    "leaky relu": functional.leaky_relu,
    "elu": functional.elu,
    "selu": functional.selu,
    "tanh": torch.tanh,
    "softplus": functional.softplus,
    "mish": functional.mish,
    "softshrink": functional.softshrink,
    "hardshrink": functional.hardshrink,
    "glu": lambda x: functional.glu(x, 1),
    "softmax": lambda x: functional.softmax(x, 1),
    "log_softmax": lambda x: functional.log_softmax(x, -1),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=(1, 2, 3)),
    "variance": lambda x: x.var((2, 3)),
    "normalize": lambda x: functional.normalize(x, dim=1),
}
VIEWS = {
    "padding and cropping": lambda x: functional.pad(x, (1, -2, -1, 3)),
    "padding of one side": lambda x: functional.pad(x, (0, 1, 0, 1)),
    "slice": lambda x: x[:, 1:3, ::2, 1::3],
    "slice from the end": lambda x: x[..., -3:],
    "select": lambda x: x[:, -1, 2],
    "chunk": lambda x: torch.mul(*x.chunk(2, 1)),
    "split": lambda x: x.split([1, 3], 1)[1],
    "patches": lambda x: torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 1::2]], 1),
    "stack": lambda x: torch.stack([x, x.sin()], 1),
    "shuffle": lambda x: functional.pixel_shuffle(functional.channel_shuffle(x, 2), 2),
    "repetition": lambda x: x.repeat(1, 2, 1, 1),
}


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_gradients_of_convolutions_are_autograds(options):
    stride, padding, dilation, groups, kernel = options
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups).double().requires_grad_(False)
    for sizes in ((11, 12), (9, 8)):
        check_operator(layer, 3, 4, *sizes)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_gradients_of_transposed_convolutions_are_autograds(options):
    stride, padding, dilation, groups, kernel = options
    torch.manual_seed(0)
    # Output padding may reach the dilation, and then beyond the stride.
    for more in (0, 1) if 2 in (stride, dilation) or stride == 3 else (0,):
        layer = nn.ConvTranspose2d(4, 8, kernel, stride, padding, output_padding=more, dilation=dilation, groups=groups)
        check_operator(layer.double().requires_grad_(False), 3, 4, 5, 6)


def test_convolutions_of_one_and_three_dimensions_and_of_free_batch():
    torch.manual_seed(0)
    layers = (nn.Conv1d(4, 6, 3, 2, 1, groups=2), nn.ConvTranspose1d(4, 6, 3, 2, 1), nn.Conv3d(4, 6, 3, 2, 1))
    for layer, sizes in zip(layers, ((11,), (11,), (7, 5, 6)), strict=True):
        check_operator(layer.double().requires_grad_(False), 3, 4, *sizes)
    check_operator(nn.Conv2d(4, 6, 3, 2, 1).double().requires_grad_(False), 3, 4, 8, 6, symbolic=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_reductions(name):
    check_operator(ACTIVATIONS[name], 3, 4, 5, 6)


def test_hard_sigmoid():
    """Beside the formula: torch's own kernel has a float32 sixth in its float64 gradient."""
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    graph = traced(vjp(functional.hardsigmoid), x, torch.ones_like(x))
    assert operators(graph) <= {
        "alias",
        "add",
        "clamp",
        "div",
        "mul",
        "gt",
        "lt",
        "bitwise_and",
        "where",
        "scalar_tensor",
    }
    assert_same(graph(x, torch.ones_like(x)), [(x / 6 + 0.5).clamp(0, 1), (x.abs() < 3).double() / 6], 1e-12)


@pytest.mark.parametrize("name", VIEWS)
def test_gradients_of_views_are_paddings(name):
    check_operator(VIEWS[name], 3, 4, 8, 6)
    check_operator(VIEWS[name], 3, 4, 8, 6, symbolic=True)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["group", "layer", "plane", "batch", "vector", "instance"])
def test_normalizations(kind, affine):
    torch.manual_seed(0)
    layer: nn.Module = {
        "group": lambda: nn.GroupNorm(2, 4, affine=affine),
        "layer": lambda: nn.LayerNorm(6, elementwise_affine=affine),
        "plane": lambda: nn.LayerNorm((8, 6), elementwise_affine=affine, bias=False),
        "batch": lambda: nn.BatchNorm2d(4, affine=affine),
        "vector": lambda: nn.BatchNorm1d(4, affine=affine),
        "instance": lambda: nn.InstanceNorm2d(4, affine=affine),
    }[kind]()
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    shape = (3, 4) if kind == "vector" else (3, 4, 8, 6)
    check_operator(layer.double().eval().requires_grad_(False), *shape)
    check_operator(layer, *shape, symbolic=True)


def test_layer_norm_has_operators_of_one_output():
    x = torch.rand(2, 3, 6)
    graph = traced(lambda x: layer_norm(x, [6], None, None, 1e-5)[0], x)
    assert "native_layer_norm" not in operators(traced(lambda x: functional.layer_norm(x, (6,)), x))
    assert distance(graph(x), functional.layer_norm(x, (6,))) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype):
    """64x64 positions of a large cotangent overflow float16."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 64, 64).to(dtype)
    cotangent = (60 + 40 * torch.randn(2, 8, 64, 64)).to(dtype)
    leaf = x.float().requires_grad_()
    expected = torch.autograd.grad(functional.group_norm(leaf, 2), leaf, cotangent.float())[0]
    mean, scale = (part.to(dtype) for part in aten.native_group_norm(x.float(), None, None, 2, 8, 4096, 2, 1e-5)[1:])
    given = group_norm_backward(cotangent, x, mean, scale, None, 2, 8, 4096, 2, [True, False, False])[0]
    assert given.dtype == dtype and distance(given, expected) < 2e-2
    out, mean, scale = layer_norm(x, [64], None, None, 1e-5)
    expected = torch.autograd.grad(functional.layer_norm(leaf, (64,)), leaf, cotangent.float())[0]
    given = layer_norm_backward(cotangent, x, [64], mean, scale, None, None, [True, False, False])[0]
    assert out.dtype == given.dtype == dtype and distance(given, expected) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_low_precision(stride, dtype):
    """A transposed convolution that is left has no bfloat16: TensorRT has none of that kind."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, stride, 1).requires_grad_(False).to(dtype)
    x = torch.randn(2, 8, 8, 8).to(dtype)
    cotangent = torch.randn_like(layer(x))
    graph = traced(vjp(layer), x, cotangent)
    convolutions = graph.graph.find_nodes(op="call_function", target=aten.convolution.default)
    assert [node.args[6] for node in convolutions] == [False, stride > 1]
    assert not any(node.args[6] and node.meta["val"].dtype == torch.bfloat16 for node in convolutions)
    given, expected = graph(x, cotangent)[1], vjp(layer.float())(x.float(), cotangent.float())[1]
    assert given.dtype == dtype and distance(given, expected) < 1e-2


def test_gradients_of_parameters_stay_operators():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3)

    def by_weight(x: Tensor, weight: Tensor) -> Tensor:
        leaf = weight.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(functional.conv2d(x, leaf).square().sum(), leaf)[0]

    x = torch.rand(2, 2, 5, 5)
    graph = traced(by_weight, x, layer.weight.detach())
    assert "convolution_backward" in operators(graph)
    assert_same([graph(x, layer.weight.detach())], [by_weight(x, layer.weight.detach())], 1e-6)


def test_whole_resizing_leaves_torch_as_it_was():
    overloads = (aten.upsample_nearest2d.default, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec)
    before = [dict(overload.py_kernels) for overload in overloads]
    with pytest.raises(KeyError), whole_resizing():
        assert [dict(overload.py_kernels) for overload in overloads] != before
        raise KeyError
    assert [dict(overload.py_kernels) for overload in overloads] == before


def test_what_torch_makes_of_resizing_by_itself_has_scatters():
    """Why `whole_resizing` is there: once this fails, it can go."""
    x = torch.rand(2, 3, 4, 4)
    pulled = vjp(lambda x: functional.interpolate(x, scale_factor=2))
    graph = make_fx(pulled, decomposition_table=decompositions(), tracing_mode="symbolic")(x, torch.rand(2, 3, 8, 8))
    assert "index_put" in operators(graph)
