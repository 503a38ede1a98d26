"""What engines are kept under: each thing that changes an engine changes its identity, and nothing else does."""

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from stand_in_stages import stand_in

from diffdfkd.engine.backends import identity as identity_module
from diffdfkd.engine.backends.build import BACKENDS, Backend, Settings
from diffdfkd.engine.backends.cache import EngineCache
from diffdfkd.engine.backends.identity import (
    BUILDERS,
    GRAPH,
    ROOT,
    engine_identity,
    graph_identity,
    package_version,
    sources_digest,
    trial_identity,
)
from diffdfkd.engine.engine_stages import Stage

F32, BF16 = torch.float32, torch.bfloat16
make = stand_in


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(EngineCache(tmp_path / "cache"), threads=1)


def test_identity_names_all_that_an_engine_depends_on(settings: Settings) -> None:
    def identity(
        stage: Stage | None = None, engine: Backend = "onnxruntime", precision: torch.dtype = F32, **changes: Any
    ) -> Any:
        return engine_identity(stage or make(F32), engine, precision, replace(settings, **changes))

    plain = identity()
    assert {"stage", "specification", "precision", "exporter", "package", "device"} <= plain.keys()
    assert plain["package"].startswith("onnxruntime ")
    assert identity() == plain
    assert identity(stand_in(digest="1" * 64)) != plain
    assert identity(stand_in(most=9)) != plain
    assert identity(precision=BF16) != plain
    # Only what is compiled for a number of threads depends on it.
    assert identity(threads=2) == plain
    assert identity(engine="compiled", threads=2) != identity(engine="compiled", threads=1)
    rtx = identity(engine="tensorrt-rtx")
    assert rtx != identity(engine="tensorrt-rtx", capabilities=("SM86",))
    assert rtx != identity(engine="tensorrt-rtx", memory_limit=2**20)
    assert len({str(identity(engine=engine)) for engine in BACKENDS}) >= 4


def test_identity_of_a_graph() -> None:
    identity = graph_identity(stand_in())
    assert identity["exporter"].keys() == {"torch", "onnx", "onnxscript", "opset"}
    assert identity["exporter"]["torch"] == torch.__version__
    assert identity["exporter"]["onnx"] == onnx.__version__
    assert identity["diffdfkd"]["sources"] == sources_digest(GRAPH)
    others = (stand_in(digest="1" * 64), stand_in(most=9), stand_in(BF16))
    assert len({str(graph_identity(stage)) for stage in (stand_in(), *others)}) == 4


@pytest.mark.parametrize("name", [*GRAPH, *sorted({name for names in BUILDERS.values() for name in names})])
def test_every_source_that_makes_a_graph_or_an_engine_counts(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    def identities() -> dict[str, str]:
        sources_digest.cache_clear()
        return {engine: str(engine_identity(stand_in(), engine, F32, settings)) for engine in BACKENDS}

    for source in {*GRAPH, *(source for sources in BUILDERS.values() for source in sources)}:
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / source).write_bytes((ROOT / source).read_bytes())
    before = identities()
    monkeypatch.setattr(identity_module, "ROOT", tmp_path)
    assert identities() == before
    (tmp_path / name).write_text("# changed\n" + (tmp_path / name).read_text())
    after = identities()
    sources_digest.cache_clear()
    concerned = set(BACKENDS) if name in GRAPH else {engine for engine, names in BUILDERS.items() if name in names}
    assert {engine for engine in BACKENDS if after[engine] != before[engine]} == concerned


NO_PART = {
    *("engine.architectures", "engine.errors", "engine.lora", "engine.memory", "engine.plan", "engine.prior_files"),
    *("engine.programs", "engine.recipe", "engine.runner", "engine.specification", "engine.weights"),
    "engine.weight_selection",
    *("engine.backends.own_folder", "engine.checkpoint", "engine.shards", "kernels.philox"),
}
"""Imported by those files, and without a say in what a stage computes from given networks."""


def imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / source).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("diffdfkd."):
            yield node.module.removeprefix("diffdfkd.")


def test_parts_of_those_sources_are_among_them() -> None:
    """A module that decompositions or stages come to use has to be named, or said to be no part."""
    listed = {source.removesuffix(".py").replace("/", ".") for source in GRAPH}
    for source in GRAPH:
        assert set(imported(source)) <= listed | NO_PART, source


def test_sources_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sources_digest(GRAPH)
    monkeypatch.setattr(identity_module, "ROOT", Path("/nowhere"))
    assert len(sources_digest(GRAPH)) == 64


def test_version_of_the_package_behind_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"onnxruntime": "1.2", "tensorrt": "10.13"}
    monkeypatch.setattr(identity_module, "_installed", there.get)
    assert package_version("onnxruntime") == "onnxruntime 1.2"
    assert package_version("tensorrt") == "tensorrt 10.13"
    assert package_version("openvino") is None
    there["onnxruntime-gpu"] = "1.3"
    assert package_version("onnxruntime") == "onnxruntime-gpu 1.3"


def test_identity_of_a_trial_holds_the_engines(settings: Settings) -> None:
    for engine in BACKENDS:
        trial, plain = (identity(stand_in(), engine, F32, settings) for identity in (trial_identity, engine_identity))
        assert trial | plain == trial and trial["engine"] == engine and trial["threads"] == 1
        assert trial["packages"]["onnxruntime"] == package_version("onnxruntime")
