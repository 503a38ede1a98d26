import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from diffdfkd.engine.architectures import small_cnn
from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.weights import digest, load_weights, save_classifier

SMALL: dict[str, Any] = {"width": 2, "blocks": [0, 0, 0]}


def small_classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(small_cnn(1, 3, **SMALL), Preprocessing(1, 16, (0.5,), (0.5,), "bilinear"), ["a", "b", "c"])


def test_saved_weights_are_byte_stable_and_keep_their_metadata(tmp_path: Path) -> None:
    network = small_classifier()
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_classifier(network, paths[0], {"licence": "MIT", "architecture": "small_cnn", "data": "Größe"})
    save_classifier(network, paths[1], {"data": "Größe", "architecture": "small_cnn", "licence": "MIT"})
    assert paths[0].read_bytes() == paths[1].read_bytes() and digest(paths[0]) == digest(paths[1])
    with safetensors.safe_open(paths[0], "pt") as file:
        assert file.metadata() == {"licence": "MIT", "architecture": "small_cnn", "data": "Größe"}
    loaded = safetensors.torch.load_file(paths[0])
    assert loaded.keys() == network.model.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in network.model.state_dict().items())


def test_weights_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_classifier(small_classifier(), path, {})
    with pytest.raises(UserError, match=rf"{path} has 3 classes \(head.weight\), the teacher has 4; teacher.classes"):
        load_weights(small_cnn(1, 4, **SMALL), path, field="teacher")
    with pytest.raises(
        UserError, match=r"mis-shaped \(features.0.0.weight \[2, 1, 3, 3\] for \[5, 1, 3, 3\], .*, \.\.\."
    ):
        load_weights(small_cnn(1, 3, 5, [0, 0, 0]), path, field="teacher")
    state = safetensors.torch.load_file(path)
    state["stranger"] = state.pop("head.bias")
    safetensors.torch.save_file(state, path)
    with pytest.raises(UserError, match=r"1 missing \(head.bias\); 1 unknown \(stranger\)"):
        load_weights(small_cnn(1, 3, **SMALL), path, field="teacher")
    state["head.bias"] = state.pop("stranger") * float("nan")
    safetensors.torch.save_file(state, path)
    with pytest.raises(UserError, match=r"not finite \(head.bias\)"):
        load_weights(small_cnn(1, 3, **SMALL), path, field="teacher")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"teacher.weights: {path} is not a safetensors file, or is truncated"):
        load_weights(small_cnn(1, 3, **SMALL), path, field="teacher")
    with pytest.raises(UserError, match=r"none.pt: no such file"):
        load_weights(small_cnn(1, 3, **SMALL), tmp_path / "none.pt", field="teacher")


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_a_hostile_pickle_is_not_executed(tmp_path: Path, way: str) -> None:
    path, marker = tmp_path / "teacher.pt", tmp_path / "executed"
    if way == "pickle":
        path.write_bytes(pickle.dumps(Hostile(marker)))
    else:
        torch.save({"weight": Hostile(marker)}, path)
    with pytest.raises(
        UserError,
        match=rf"teacher.weights: {path} is neither a safetensors nor a plain torch state dict, and is not executed",
    ):
        load_weights(nn.Linear(1, 1), path, field="teacher")
    assert not marker.exists()


def test_pickles_of_plain_state_dicts_are_read_and_others_refused(tmp_path: Path) -> None:
    path, model, source = tmp_path / "model.pt", nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(source.state_dict(), path)
    load_weights(model, path, field="student")
    assert torch.equal(model.weight, source.weight)
    for held in ({"epoch": 3, "weights": source.state_dict()}, {}, {"state_dict": {"weight": 3}}):
        torch.save(held, path)
        with pytest.raises(UserError, match=rf"not a plain state dict but a dict with {', '.join(held)}"):
            load_weights(model, path, field="student")
    torch.save(source, path)
    with pytest.raises(UserError, match="is not executed"):
        load_weights(model, path, field="student")
    for rubbish in (b"not a pickle", b"root:x:0:0:root", bytes(range(256))):
        path.write_bytes(rubbish)
        with pytest.raises(UserError, match="is not executed"):
            load_weights(model, path, field="student")
    for broken, words in ((b"", "is empty"), (b"PK\x03\x04 and no more", "is cut short")):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=words):
            load_weights(model, path, field="student")


def test_the_digest_of_a_folder_knows_names_and_contents(tmp_path: Path) -> None:
    def make(name: str, files: dict[str, bytes]) -> str:
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return digest(tmp_path / name)

    whole = make("a", {"x/1": b"one", "2": b"two"})
    assert make("b", {"2": b"two", "x/1": b"one"}) == whole
    assert make("c", {"x/1": b"one", "3": b"two"}) != whole
    assert make("d", {"x/1": b"one", "2": b"tww"}) != whole
    card = {"README.md": b"a card", ".git/config": b"url", "x/.cache": b"more"}
    assert make("e", {"x/1": b"one", "2": b"two", **card}) == whole
    with pytest.raises(UserError, match="no such file or folder"):
        digest(tmp_path / "none")


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes_of_training_scripts_are_taken_off(
    tmp_path: Path, wrapper: str | None, prefix: str
) -> None:
    path, source, model = tmp_path / "weights.pth", Normed(), Normed()
    state: dict[str, Any] = {prefix + key: value for key, value in source.state_dict().items()}
    if wrapper:
        optimizer = torch.optim.SGD(source.parameters(), lr=0.1).state_dict()
        state = {"epoch": 3, "arch": "wrn40_2", wrapper: state, "best_acc1": 94.87, "optimizer": optimizer}
    torch.save(state, path)
    load_weights(model, path, field="teacher")
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_prefix_that_the_model_has_too_stays(tmp_path: Path) -> None:
    path, source = tmp_path / "weights.safetensors", nn.ModuleDict({"module": nn.Linear(2, 2)})
    safetensors.torch.save_file(source.state_dict(), path)
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    load_weights(model, path, field="teacher")
    assert torch.equal(model["module"].weight, source["module"].weight)


def test_counters_of_batches_may_be_missing_or_too_many(tmp_path: Path) -> None:
    path, source, model = tmp_path / "weights.safetensors", Normed(), Normed()
    state = source.state_dict()
    del state["bn.num_batches_tracked"]
    safetensors.torch.save_file({**state, "gone.num_batches_tracked": torch.tensor(3)}, path)
    load_weights(model, path, field="teacher")
    assert torch.equal(model.conv.weight, source.conv.weight) and model.bn.num_batches_tracked == 0
    del state["bn.running_mean"]
    safetensors.torch.save_file(state, path)
    with pytest.raises(UserError, match=r"1 missing \(bn.running_mean\); check teacher.architecture"):
        load_weights(model, path, field="teacher")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda weight: weight.to("meta"), r"a tensor without data \(meta\)"),
        (lambda weight: weight.to_sparse(), r"not dense \(sparse_coo\)"),
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), r"quantised \(qint8\)"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda weight: weight.to(torch.complex64), "complex64"),
        (lambda weight: weight > 0, "bool"),
        (lambda weight: weight.long(), "int64"),
    ],
)
def test_tensors_of_another_kind_are_named(make: Any, words: str, tmp_path: Path) -> None:
    path, model = tmp_path / "weights.pt", nn.Linear(3, 2)
    torch.save({"weight": make(model.weight.detach()), "bias": torch.zeros(2)}, path)
    with pytest.raises(
        UserError, match=rf"^teacher.weights: {path}: weight is {words}, but a plain tensor of float32 is needed; save"
    ):
        load_weights(model, path, field="teacher")
    torch.save({"weight": torch.ones(2, 3, dtype=torch.float64), "bias": torch.zeros(2).half()}, path)
    load_weights(model, path, field="teacher")
    assert torch.equal(model.weight, torch.ones(2, 3))


def test_negative_variances_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "weights.safetensors", Normed()
    safetensors.torch.save_file({**model.state_dict(), "bn.running_var": torch.tensor([1.0, -0.1])}, path)
    with pytest.raises(UserError, match=r"holds negative variances \(bn.running_var\)"):
        load_weights(model, path, field="teacher")


@pytest.mark.parametrize(
    ("held", "name"),
    [(argparse.Namespace(lr=1), r"argparse\.Namespace"), (np.float64(94.2), r"numpy\.\w+\.multiarray\.scalar")],
)
def test_what_keeps_a_checkpoint_from_being_read_is_named(held: Any, name: str, tmp_path: Path) -> None:
    path, model = tmp_path / "checkpoint.pt", nn.Linear(3, 2)
    torch.save({"state_dict": model.state_dict(), "args": held}, path)
    with pytest.raises(UserError, match=rf"is not executed \(it holds {name}, which is no tensor .*; save it with"):
        load_weights(model, path, field="teacher")
