import pytest
import torch
from torch import Tensor

from diffdfkd.kernels.predict import predict
from diffdfkd.kernels.row import COLUMNS


def make_row(**values: float) -> Tensor:
    return torch.tensor([values.get(name, 0.0) for name in COLUMNS])


ROW = make_row(x0_z=1.5, x0_m=-0.8, eps_z=0.3, eps_m=0.9)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 5, 7), (2, 1, 1, 63)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_guided_prediction(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z, output = torch.randn(shape), torch.randn(2 * shape[0], *shape[1:]).to(dtype)
    scale = 1 + torch.rand(shape[0])
    result = predict(z, output, ROW, scale)
    for b in range(shape[0]):
        unconditional, conditional = output[b].float(), output[shape[0] + b].float()
        m = unconditional + scale[b] * (conditional - unconditional)
        torch.testing.assert_close(result.x0[b], 1.5 * z[b] - 0.8 * m)
        torch.testing.assert_close(result.eps_hat[b], 0.3 * z[b] + 0.9 * m)
        torch.testing.assert_close(result.guidance_norm[b], (conditional - unconditional).norm())
        torch.testing.assert_close(result.x0_norm[b], result.x0[b].norm())
    assert {tensor.dtype for tensor in result} == {torch.float32}


def test_one_number_serves_all_samples() -> None:
    z, output = torch.randn(3, 4, 2, 2), torch.randn(6, 4, 2, 2)
    for one, other in zip(predict(z, output, ROW, 2.5), predict(z, output, ROW, torch.full((3,), 2.5)), strict=True):
        torch.testing.assert_close(one, other)


def test_without_classifier_free_guidance() -> None:
    z, output = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    result = predict(z, output, ROW, 1.0)
    torch.testing.assert_close(result.x0, 1.5 * z - 0.8 * output)
    assert torch.equal(result.guidance_norm, torch.zeros(3))


def test_channels_last_is_the_same() -> None:
    z, output = torch.randn(3, 4, 5, 6), torch.randn(6, 4, 5, 6)
    expected = predict(z, output, ROW, 2.0)
    result = predict(z.to(memory_format=torch.channels_last), output.to(memory_format=torch.channels_last), ROW, 2.0)
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_sample_that_is_not_finite_shows_in_its_norm_alone() -> None:
    z, output = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    output[1, 0, 0, 0] = torch.nan
    result = predict(z, output, ROW, 1.0)
    assert torch.isfinite(result.x0_norm).tolist() == [True, False, True]


def test_bad_arguments() -> None:
    z = torch.randn(3, 4, 2, 2)
    with pytest.raises(ValueError, match="model_output"):
        predict(z, torch.randn(4, 4, 2, 2), ROW, 2.0)
    with pytest.raises(ValueError, match="model_output"):
        predict(z, torch.randn(6, 4, 2, 3), ROW, 2.0)
    with pytest.raises(ValueError, match="scale"):
        predict(z, torch.randn(3, 4, 2, 2), ROW, 2.0)
    with pytest.raises(ValueError, match="scale"):
        predict(z, torch.randn(6, 4, 2, 2), ROW, torch.ones(6))
    with pytest.raises(ValueError, match="row"):
        predict(z, torch.randn(6, 4, 2, 2), torch.ones(3), 2.0)
