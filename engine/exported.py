"""Classifiers saved by ``torch.export.save``, read as what they are: a list of ATen calls, and weights as raw bytes.

``torch.export.load`` is not used, since a file from a stranger can make it run anything: in torch 2.14 it unpickles
payloads that say so, evaluates symbolic shapes with sympy, compiles guards, and finds operators by attribute look-up
from ``torch``. Here names are looked up in tables, and an operator must be one of ATen's that touch tensors alone.
The archive is read by Python's zipfile alone, so that no second reader can find other entries in it.
"""

import json
import math
import operator
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffdfkd.engine.errors import UserError

SCHEMA = 8
"""Major version of the format, as torch 2.9 to 2.14 write it."""

DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""The format's numbers of dtypes."""

MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}

ARITHMETIC: dict[str, Callable[..., Any]] = {
    f"_operator.{function.__name__}": function
    for function in (
        *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg),
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.getitem),
    )
}
"""On sizes."""

REFUSED = re.compile(
    r"from_file|save|set_?|set_data|shallow_copy_data_|resize.*|manual_seed|seed|record_stream|pin_memory|coalesce"
    r"|(fbgemm|mkldnn|mkl|miopen|cudnn|mps|xpu|quantized?|fake_quantize|fused|choose_qparams|q)_.*|dequantize|int_repr"
    r"|empty_quantized|qscheme|smm|sspaddmm|hspmm|to_padded_tensor|.*(sparse|mkldnn|backward|nested).*"
)
"""ATen operators that reach beyond the tensors that they are given, or trust what is in them: packed and quantised
weights as addresses, sparse and nested tensors, steps of a backward pass."""

INTERNAL = (
    *("_adaptive_avg_pool2d", "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "_batch_norm_no_update"),
    *("_conv_depthwise2d", "_log_softmax", "_native_batch_norm_legit_no_training", "_softmax", "_to_copy"),
    *("_scaled_dot_product_attention_math", "_unsafe_view", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"),
)
"""Those of ATen's internal operators that exported classifiers hold; others may trust their arguments too much."""

DYNAMIC = "export two example images with dynamic_shapes=({0: torch.export.Dim('batch')},)"


class Reference(NamedTuple):
    """A value computed before, by its name in the program."""

    name: str


DEVICE = Reference("")
"""The device of the images, whatever device the program was exported on."""


@dataclass
class Call:
    function: Callable[..., Any]
    positional: list[Any]
    keywords: dict[str, Any]
    results: list[Any]
    """What the values are called: a name, a list of names, or None, for each value that the function returns."""
    last: list[str] = field(default_factory=list)
    """Values that no later call needs."""


class ExportedNetwork(nn.Module):
    """The program's calls, one after the other; images [B,C,H,W] to what the program returns."""

    def __init__(self, weights: dict[str, tuple[str, Tensor]], image: str, calls: list[Call], result: str) -> None:
        super().__init__()
        self.image, self.calls, self.result = image, calls, result
        self.names: dict[str, str] = {}
        for name, (key, tensor) in weights.items():
            self.names[name] = key.replace(".", "/")
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(self.names[name], tensor)
            else:
                self.register_buffer(self.names[name], tensor)
        kept = {result}
        for call in reversed(calls):
            used = _references([call.positional, list(call.keywords.values())]) | set(_names(call.results))
            call.last = sorted(used - kept)
            kept |= used

    def forward(self, images: Tensor) -> Tensor:
        values: dict[str, Any] = {name: getattr(self, key) for name, key in self.names.items()}
        values |= {self.image: images, DEVICE.name: images.device}
        for call in self.calls:
            keywords = {name: _filled(value, values) for name, value in call.keywords.items()}
            answer = call.function(*_filled(call.positional, values), **keywords)
            if len(call.results) > 1:
                for name, value in zip(call.results, answer, strict=True):
                    _keep(values, name, value)
            elif call.results:
                _keep(values, call.results[0], answer)
            for name in call.last:
                del values[name]
        return values[self.result]


def read_exported(path: Path, channels: int, size: int, *, where: str) -> ExportedNetwork:
    """The network of a ``.pt2`` file for images [B,channels,size,size]; nothing in the file is executed or unpickled.

    Raises UserError, beginning with `where`, for a damaged file, for operators that are not plain ATen, for a program
    exported in train mode, and for one whose batch or image size is fixed to another.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, (channels, size, size), f"{where}: {path}")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{where}: {path} is not a program of torch.export.save, or is damaged "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error


def _read(archive: zipfile.ZipFile, image: tuple[int, ...], where: str) -> ExportedNetwork:
    found = [name for name in archive.namelist() if re.fullmatch(r"([^/]+/)?models/model\.json", name)]
    if len(found) != 1:
        raise UserError(
            f"{where} holds no program of torch.export.save in the format of torch 2.9 or later; export it again"
        )
    root = found[0].removesuffix("models/model.json")
    if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
        raise UserError(f"{where} was written on a big-endian machine; export it on a little-endian one")
    content = json.loads(archive.read(found[0]))
    if (major := content["schema_version"]["major"]) != SCHEMA:
        raise UserError(f"{where} has format {major}, and {SCHEMA} is read; export it with torch 2.9 to 2.14")
    graph, signature = content["graph_module"]["graph"], content["graph_module"]["signature"]
    tensors = _payloads(archive, f"{root}data/weights/", "model_weights_config.json", where)
    tensors |= _payloads(archive, f"{root}data/constants/", "model_constants_config.json", where)
    weights: dict[str, tuple[str, Tensor]] = {}
    images: list[str] = []
    for spec in signature["input_specs"]:
        ((kind, given),) = spec.items()
        if kind == "user_input":
            images.append(given["arg"]["as_tensor"]["name"])
            continue
        key = given.get("parameter_name") or given.get("buffer_name") or given.get("tensor_constant_name")
        if kind not in ("parameter", "buffer", "tensor_constant") or key not in tensors:
            raise UserError(f"{where} has an input of kind {kind}, which only torch.export.load could unpickle")
        weights[given["arg"]["name"]] = (key, tensors[key])
    outputs = [next(iter(spec)) for spec in signature["output_specs"]]
    if any(kind.endswith("_mutation") for kind in outputs):
        raise UserError(f"{where} was exported in train mode; call model.eval() before torch.export.export")
    if len(images) != 1 or outputs != ["user_output"]:
        raise UserError(
            f"{where} takes {len(images)} inputs and gives {len(outputs)} outputs; a classifier takes images alone "
            "and gives logits alone"
        )
    _check_shape(graph["tensor_values"][images[0]]["sizes"], image, where)
    calls = [_call(node, set(weights), where) for node in graph["nodes"]]
    result = signature["output_specs"][0]["user_output"]["arg"]["as_tensor"]["name"]
    return ExportedNetwork(weights, images[0], calls, result)


def _payloads(archive: zipfile.ZipFile, folder: str, config: str, where: str) -> dict[str, Tensor]:
    """Tensors by their names in the model, each made from its bytes."""
    if folder + config not in archive.namelist():
        raise UserError(f"{where} keeps its weights as a pickle, which is not read; export it with torch 2.9 or later")
    tensors: dict[str, Tensor] = {}
    for key, entry in json.loads(archive.read(folder + config))["config"].items():
        meta = entry["tensor_meta"]
        if entry["use_pickle"] or meta is None or meta["dtype"] not in DTYPES:
            raise UserError(f"{where}: {key} is a pickle or no plain tensor, which is not read")
        sizes, strides = ([int(size["as_int"]) for size in meta[kind]] for kind in ("sizes", "strides"))
        content, dtype = bytearray(archive.read(folder + entry["path_name"])), DTYPES[meta["dtype"]]
        if math.prod(sizes) == 0:
            tensor = torch.zeros(sizes, dtype=dtype)
        else:
            # Refuses what lies outside of the bytes.
            flat = torch.frombuffer(content, dtype=dtype)
            tensor = flat.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"])).clone()
        tensors[key] = nn.Parameter(tensor, requires_grad=False) if entry["is_param"] else tensor
    return tensors


def _check_shape(sizes: list[dict[str, Any]], image: tuple[int, ...], where: str) -> None:
    """Refuse a batch that is fixed, or images of another size."""
    fixed = [size.get("as_int") for size in sizes]
    if len(fixed) != 4:
        raise UserError(f"{where} takes tensors of {len(fixed)} dimensions, not images [B, C, H, W]")
    if fixed[0] is not None:
        raise UserError(f"{where} was exported for a fixed batch of {fixed[0]}; {DYNAMIC}")
    if any(known is not None and known != wanted for known, wanted in zip(fixed[1:], image, strict=True)):
        shown = "x".join("any" if known is None else str(known) for known in fixed[1:])
        raise UserError(
            f"{where} was exported for {shown} images, but teacher.channels and teacher.size say "
            f"{'x'.join(map(str, image))}; set these, or export it for such images"
        )


def _call(node: dict[str, Any], weights: set[str], where: str) -> Call:
    """One node of the graph, its operator looked up and its arguments decoded."""
    target = node["target"]
    function = ARITHMETIC.get(target) or _operator(target)
    if function is None:
        raise UserError(
            f"{where} uses {target}, and only plain ATen operators are executed; bring the module's code "
            "(package.module:factory) and its state dict"
        )
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    written = {
        argument.name
        for argument in (function._schema.arguments if isinstance(function, torch._ops.OpOverload) else ())
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    for given in node["inputs"]:
        name, value = given["name"], _decoded(given["arg"], where)
        if (name in ("train", "training") and value is True) or (name in written and _references(value) & weights):
            raise UserError(f"{where} was exported in train mode; call model.eval() before torch.export.export")
        if given.get("kind", 1) == 2:
            keywords[name] = value
        else:
            positional.append(value)
    return Call(function, positional, keywords, [_result(output, where) for output in node["outputs"]])


def beyond(name: str) -> bool:
    """Whether an ATen operator of this name has no place in a classifier that computes on plain tensors."""
    return REFUSED.fullmatch(name) is not None


def _operator(target: str) -> Callable[..., Any] | None:
    match = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    if match is None:
        return None
    name, overload = match.groups()
    if beyond(name) or (name.startswith("_") and name not in INTERNAL):
        return None
    function = getattr(getattr(torch.ops.aten, name, None), overload, None)
    return function if isinstance(function, torch._ops.OpOverload) else None


def _decoded(argument: dict[str, Any], where: str) -> Any:
    """Python value of an argument; values of the program become References."""
    ((kind, value),) = argument.items()
    if kind == "as_none":
        return None
    if kind in ("as_tensor", "as_name"):
        return Reference(value["name"] if kind == "as_tensor" else value)
    if kind in ("as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools", "as_string"):
        return float(value) if kind == "as_float" else value
    if kind == "as_tensors":
        return [Reference(each["name"]) for each in value]
    if kind in ("as_sym_int", "as_sym_bool", "as_sym_float", "as_optional_tensor"):
        return _decoded(value, where)
    if kind in ("as_sym_ints", "as_optional_tensors"):
        return [_decoded(each, where) for each in value]
    if kind == "as_scalar_type":
        return DTYPES[value]
    if kind == "as_memory_format":
        return MEMORY_FORMATS[value]
    if kind == "as_layout" and value == 7:
        return torch.strided
    if kind == "as_device":
        return DEVICE
    raise UserError(f"{where} has an argument of kind {kind}, which is not read; bring the module's code instead")


def _result(output: dict[str, Any], where: str) -> Any:
    decoded = _decoded(output, where)
    if isinstance(decoded, list):
        return [each.name if isinstance(each, Reference) else None for each in decoded]
    return decoded.name if isinstance(decoded, Reference) else None


def _filled(value: Any, values: dict[str, Any]) -> Any:
    if isinstance(value, Reference):
        return values[value.name]
    return [_filled(each, values) for each in value] if isinstance(value, list) else value


def _keep(values: dict[str, Any], name: Any, value: Any) -> None:
    if isinstance(name, list):
        for each, part in zip(name, value, strict=True):
            _keep(values, each, part)
    elif name is not None:
        values[name] = value


def _references(value: Any) -> set[str]:
    if isinstance(value, Reference):
        return {value.name}
    return set().union(*map(_references, value)) if isinstance(value, list) else set()


def _names(results: list[Any]) -> list[str]:
    flat = [each for result in results for each in (result if isinstance(result, list) else [result])]
    return [name for name in flat if name is not None]
