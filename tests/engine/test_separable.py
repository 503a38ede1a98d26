import pytest
import torch
from torch import Tensor
from torch.nn import functional
from tracing import check_operator, operators, traced, vjp

SIZES = [((9, 7), (5, 11)), ((16, 16), (8, 8)), ((7, 5), (1, 15))]
MODES = [
    {"mode": "nearest"},
    {"mode": "nearest-exact"},
    {"mode": "bilinear", "antialias": True},
    {"mode": "bicubic", "antialias": True},
    {"mode": "bilinear"},
    {"mode": "bilinear", "align_corners": True},
    {"mode": "bicubic"},
    {"mode": "bicubic", "align_corners": True},
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_resizing_and_its_gradient_are_autograds(mode: dict) -> None:
    for sizes, out in SIZES:
        check_operator(lambda x, out=out: functional.interpolate(x, size=out, **mode), 3, 2, *sizes)
    check_operator(lambda x: functional.interpolate(x, scale_factor=(2.4, 0.7), **mode), 3, 2, 7, 6)
    check_operator(lambda x: functional.interpolate(x, scale_factor=1.6, **mode), 3, 2, 7, 6, symbolic=True)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_whole_factors_repeat_pixels(mode: str) -> None:
    for symbolic in (False, True):
        check_operator(
            lambda x: functional.interpolate(x, scale_factor=(2.0, 3.0), mode=mode), 3, 2, 7, 6, symbolic=symbolic
        )


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil_mode", "count_include_pad", "divisor"),
    [
        (2, 2, 0, False, True, None),
        (3, None, 0, False, True, 5),
        (3, 2, 1, False, True, None),
        (3, 2, 1, True, False, None),
        (5, 2, 2, True, True, None),
        (3, 1, 1, False, False, 4),
        ((3, 2), (2, 1), (1, 0), True, True, None),
        (2, 3, 0, False, True, None),
    ],
)
def test_average_pooling_and_its_gradient_are_autograds(kernel, stride, padding, ceil_mode, count_include_pad, divisor):
    def pool(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor)

    check_operator(pool, 3, 2, 9, 7)
    check_operator(pool, 3, 2, 8, 12, symbolic=True)


@pytest.mark.parametrize("size", [1, 2, (4, 2), 3, (5, 4)])
def test_adaptive_average_pooling_and_its_gradient_are_autograds(size):
    check_operator(lambda x: functional.adaptive_avg_pool2d(x, size), 3, 2, 8, 8)
    check_operator(lambda x: functional.adaptive_avg_pool2d(x, size), 3, 2, 9, 7, symbolic=True)


def test_pooling_of_channels_last_to_one_pixel_leaves_no_strides_behind():
    """torch sets strides by hand there, which the exporter spells out in loops."""

    def pool(x: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1).flatten(1)

    check_operator(pool, 3, 2, 8, 6)
    check_operator(pool, 3, 2, 8, 6, symbolic=True)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_by_its_own_pixels_and_its_gradient_are_autograds(mode):
    check_operator(lambda x: functional.pad(x, (1, 2, 0, 3), mode=mode), 3, 2, 8, 6)


def test_one_constant_serves_equal_sizes_and_has_the_activations_dtype():
    def resize(x: Tensor) -> Tensor:
        x = functional.interpolate(x, size=(5, 5), mode="bilinear", antialias=True)
        return functional.interpolate(x, size=(8, 8), mode="bilinear", antialias=True)

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.rand(2, 3, 8, 8, dtype=dtype)
        graph = traced(vjp(resize), x, torch.rand(2, 3, 8, 8, dtype=dtype))
        constants = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
        # 8 -> 5 and 5 -> 8, and their transposes for the gradient.
        assert len(constants) == 4
        assert all(getattr(graph, name).dtype == dtype for name in constants)


def test_whole_factors_take_no_matrix():
    graph = traced(
        vjp(lambda x: functional.interpolate(x, scale_factor=2)), torch.rand(2, 3, 4, 4), torch.rand(2, 3, 8, 8)
    )
    assert operators(graph) >= {"upsample_nearest2d", "avg_pool2d"} and "mm" not in operators(graph)
