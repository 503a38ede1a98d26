"""The student as ONNX, preprocessing inside, written only once it answers as the network does."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.onnx_files import OPSET, deepest_line, silent, strip_notes
from diffdfkd.engine.shards import write_atomic

TOLERANCE = 1e-4
"""Of the largest difference between two logits, relative to the largest logit; float32 on a CPU gives about 1e-6."""
BATCHES = (1, 2, 5)
"""Sizes of the batches of random images that parity is checked on."""


class NotExportable(Exception):
    """No ONNX file was written; the message is the reason, in one line."""


@dataclass(frozen=True)
class Parity:
    """How far the file's logits are from the network's."""

    runtime: str
    """What ran the file, with its version."""
    images: int
    max_abs: float
    max_rel: float
    """``max_abs`` over the largest absolute logit of the network."""
    tolerance: float = TOLERANCE


def export_onnx(
    classifier: Classifier, path: Path, *, metadata: Mapping[str, str], images: Sequence[Tensor] = ()
) -> Parity:
    """Write ``images`` float32 [N,C,H,W] in [0, 1] -> ``logits`` [N,K], N free, at the classifier's own input size.

    Parity with eager is checked on random batches and on `images`, float32 [n,C,H,W] each, and stands in the file's
    metadata with what is given. Equal classifiers give equal bytes on one machine type and with one version of torch.
    Raises NotExportable, with nothing written, for a network that the exporter refuses or where parity fails.
    """
    training = classifier.training
    classifier.eval()
    try:
        model = _graph(classifier)
        batches = [*_random_batches(classifier), *images]
        # Before the metadata, which has nothing to say about the arithmetic.
        parity = measure_parity(classifier, model.SerializeToString(deterministic=True), batches)
    finally:
        classifier.train(training)
    if not parity.max_rel <= TOLERANCE:
        raise NotExportable(
            f"{parity.runtime} differs from torch by {parity.max_abs:.1e}, {parity.max_rel:.1e} of the largest logit, "
            f"where {TOLERANCE:.0e} is allowed"
        )
    described = {
        **metadata,
        "classes": json.dumps(classifier.classes, ensure_ascii=False),
        "parity": json.dumps(asdict(parity)),
    }
    for key in sorted(described):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, described[key]
    write_atomic(path, model.SerializeToString(deterministic=True))
    return parity


def _graph(classifier: Classifier) -> Any:
    """The checked ModelProto, without the exporter's notes, which name files of this machine."""
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it, and says so less clearly)
    except ImportError as error:
        raise NotExportable(f"{error.name} is not installed; pip install onnx onnxscript") from error
    size, channels = classifier.preprocessing.size, classifier.preprocessing.channels
    try:
        with silent(), torch.no_grad():
            program = torch.onnx.export(
                classifier,
                (torch.rand(2, channels, size, size),),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        assert program is not None
        model = program.model_proto
        strip_notes(model)
        onnx.checker.check_model(model, full_check=True)
    # Whatever a network's own code, the tracer or the converter raises: the reason is handed on.
    except Exception as error:
        raise NotExportable(f"torch.onnx.export refuses this network: {deepest_line(error)}") from error
    return model


def _random_batches(classifier: Classifier) -> Iterator[Tensor]:
    size, channels = classifier.preprocessing.size, classifier.preprocessing.channels
    generator = torch.Generator().manual_seed(0)
    for count in BATCHES:
        yield torch.rand(count, channels, size, size, generator=generator)


@torch.no_grad()
def measure_parity(classifier: Classifier, model: bytes, batches: Sequence[Tensor]) -> Parity:
    """The logits of a serialized model beside the classifier's, by onnxruntime or else by onnx's own evaluator."""
    try:
        runtime, answer = _runner(model)
        answers = [torch.from_numpy(answer(batch.numpy())) for batch in batches]
    # Each runtime has its own errors, and lacks operators of its own.
    except Exception as error:
        raise NotExportable(f"the file does not run: {deepest_line(error)}") from error
    max_abs = largest = 0.0
    count = 0
    for batch, given in zip(batches, answers, strict=True):
        expected = classifier(batch)
        difference = (given - expected).abs()
        # Not a number is no agreement: max() would pass over it.
        if not difference.isfinite().all():
            raise NotExportable(f"{runtime} gives logits that are not finite")
        max_abs = max(max_abs, float(difference.max()))
        largest = max(largest, float(expected.abs().max()))
        count += len(batch)
    return Parity(runtime, count, max_abs, max_abs / largest if largest else max_abs)


def _runner(model: bytes) -> tuple[str, Any]:
    """Name of the runtime, and a function from a batch to logits, both numpy."""
    try:
        import onnxruntime
    except ImportError:
        import onnx
        from onnx.reference import ReferenceEvaluator

        evaluator: Any = ReferenceEvaluator(onnx.load_model_from_string(model))
        return f"onnx {onnx.__version__} (reference)", lambda batch: evaluator.run(None, {"images": batch})[0]
    options = onnxruntime.SessionOptions()
    # One thread, in order: the figures enter the file, and are to be the same each time.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return (
        f"onnxruntime {onnxruntime.__version__}",
        lambda batch: session.run(["logits"], {"images": batch})[0],
    )
