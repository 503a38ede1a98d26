"""The ONNX file answers as the network does, or is not written."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffdfkd.engine import onnx_export
from diffdfkd.engine.architectures import ARCHITECTURES
from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.onnx_export import NotExportable, export_onnx, measure_parity

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

CLASSES = ["T-shirt/top", "<b>Shoe</b>"]


class Moody(nn.Module):
    """What it does depends on the values of its input: no graph says that."""

    def forward(self, images: Tensor) -> Tensor:
        answer = images.mean((2, 3))[:, :1].repeat(1, 2)
        return answer if images.sum() > 0 else 2 * answer


def classifier(model: nn.Module | None = None) -> Classifier:
    torch.manual_seed(0)
    model = model or ARCHITECTURES["small_cnn"](channels=3, classes=2, width=4, blocks=[0, 0, 0])
    preprocessing = Preprocessing(3, 16, (0.2, 0.3, 0.4), (0.3, 0.4, 0.5), "bilinear")
    return Classifier(model, preprocessing, CLASSES)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Path, Any]:
    network, path = classifier(), tmp_path_factory.mktemp("onnx") / "student.onnx"
    parity = export_onnx(network, path, metadata={"licence": "mit"}, images=[torch.rand(4, 3, 16, 16)])
    return network, path, parity


@pytest.mark.parametrize("count", [1, 3, 64])
def test_file_takes_images_in_any_number_and_normalises_them(
    exported: tuple[Classifier, Path, Any], count: int
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    network, path, _ = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.rand(count, 3, 16, 16)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    assert network.training
    with torch.no_grad():
        np.testing.assert_allclose(logits, network.eval()(images).numpy(), rtol=1e-4, atol=1e-5)
    network.train()
    (image,) = session.get_inputs()
    assert (image.name, image.type, image.shape[1:]) == ("images", "tensor(float)", [3, 16, 16])


def test_file_says_classes_licence_and_parity(exported: tuple[Classifier, Path, Any]) -> None:
    _, path, parity = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said["classes"]) == CLASSES and said["licence"] == "mit"
    assert json.loads(said["parity"])["max_rel"] == parity.max_rel < 1e-5
    assert parity.images == sum(onnx_export.BATCHES) + 4
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [21]


def test_equal_networks_give_equal_bytes_that_name_no_file_of_this_machine(
    exported: tuple[Classifier, Path, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export_onnx(classifier(), tmp_path / "again.onnx", metadata={"licence": "mit"}, images=[torch.rand(4, 3, 16, 16)])
    ours, theirs = ((onnx.load(path)) for path in (tmp_path / "again.onnx", exported[1]))
    # The images that parity was checked on are not the same ones.
    for model in (ours, theirs):
        del model.metadata_props[:]
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)
    assert str(Path(onnx_export.__file__).parent).encode() not in (tmp_path / "again.onnx").read_bytes()
    assert capfd.readouterr() == ("", "")


def test_reference_evaluator_where_there_is_no_runtime(
    exported: tuple[Classifier, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    parity = measure_parity(classifier().eval(), exported[1].read_bytes(), [torch.rand(3, 3, 16, 16)])
    assert parity.runtime == f"onnx {onnx.__version__} (reference)" and parity.max_rel < 1e-5


def test_network_that_no_graph_holds_is_refused_with_the_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        NotExportable, match=r"^torch\.onnx\.export refuses this network: \w+: .*data-dependent"
    ) as error:
        export_onnx(classifier(Moody()), tmp_path / "s.onnx", metadata={})
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(NotExportable, match=f"^{missing} is not installed; pip install"):
        export_onnx(classifier(), tmp_path / "s.onnx", metadata={})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(lambda logits: logits * 1.001, "differs from torch by"), (lambda logits: logits * np.nan, "not finite")],
)
def test_wrong_answers_are_not_written(
    exported: tuple[Classifier, Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[Any], Any],
    words: str,
) -> None:
    honest = onnx_export._runner

    def lying(model: bytes) -> tuple[str, Any]:
        name, answer = honest(model)
        return name, lambda batch: wrong(answer(batch))

    monkeypatch.setattr(onnx_export, "_graph", lambda network: onnx.load(exported[1]))
    monkeypatch.setattr(onnx_export, "_runner", lying)
    with pytest.raises(NotExportable, match=words):
        export_onnx(classifier(), tmp_path / "s.onnx", metadata={})
    assert not list(tmp_path.iterdir())


def test_bytes_that_are_no_model_do_not_run() -> None:
    with pytest.raises(NotExportable, match="the file does not run"):
        measure_parity(classifier().eval(), b"no model", [torch.rand(1, 3, 16, 16)])
