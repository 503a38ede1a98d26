"""A stage as an ONNX file: traced, translated, checked, and compared with the stage by ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffdfkd.engine.backends.own_folder import DISK
from diffdfkd.engine.engine_stages import Stage
from diffdfkd.engine.folded_upsampling import by_phases, transposed
from diffdfkd.engine.memory import less_memory, may_pass
from diffdfkd.engine.onnx_files import OPSET, deepest_line, silent
from diffdfkd.engine.runner import NoEngine
from diffdfkd.engine.trace import trace

MODEL = "model.onnx"
EXTERNAL = 256 * 2**20
"""Bytes of weights from which on they lie in a file of their own: protobuf ends at 2 GiB."""
BFLOAT16_OPSET = 22
"""The first in which convolutions are defined for bfloat16."""


def export_stage(stage: Stage, folder: Path) -> Mapping[str, Any]:
    """Write ``folder/model.onnx``, weights of large stages beside it, and say what it is.

    Names, dtypes and order of inputs and outputs are the specification's; the opset is 21, in bfloat16 22.
    Raises NoEngine where a network cannot be traced or translated.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it, and says so less clearly)
    except ImportError as error:
        raise NoEngine(f"{error.name} is not installed; pip install onnx onnxscript") from None
    specification = stage.specification
    path = folder / MODEL
    opset = BFLOAT16_OPSET if stage.precision == torch.bfloat16 else OPSET
    try:
        with silent(), torch.no_grad():
            program, _ = trace(stage, doubling=by_phases if stage.precision == torch.bfloat16 else transposed)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[port.name for port in specification.inputs],
                output_names=[port.name for port in specification.outputs],
                verbose=False,
                # Its rewriting takes longer than all else together, and each engine optimises by itself.
                optimize=False,
            )
            assert exported is not None
            _fold(exported.model)
            _strip(exported.model)
            weights = _weights_bytes(exported.model)
            exported.save(path, external_data=weights > EXTERNAL)
            del exported, program
            # By its path, so that weights beside it are looked at too.
            onnx.checker.check_model(str(path), full_check=True)
    # Whatever a network's own code, the tracer or the converter raises: the reason is handed on.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise  # that of the folder is at fault, which is for its owner to say
        said = f"{stage.name}: torch.onnx.export refuses it: {deepest_line(error)}{less_memory(error)}"
        raise NoEngine(said, lasting=not may_pass(error)) from error
    return {"opset": opset, "weights_bytes": weights, "specification": specification.describe()}


def _weights_bytes(model: Any) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


def _fold(model: Any) -> None:
    """Constants computed, dead nodes dropped: shapes become plain numbers where they are."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    common.InlinePass()(model)
    fold_constants(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.IdentityEliminationPass()(model)


def _strip(model: Any) -> None:
    """Without the exporter's notes, which name files of this machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
