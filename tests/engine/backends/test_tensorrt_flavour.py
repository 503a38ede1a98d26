"""Which TensorRT package serves which GPU, and what is said where one cannot be had."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from recording_tensorrt import RecordingTensorRT

from diffdfkd.engine.backends.tensorrt_flavour import (
    CURRENT,
    FLAVOURS,
    Flavour,
    capabilities,
    here,
    load_flavour,
    log_of,
    runs_on,
    targets,
)
from diffdfkd.engine.runner import NoEngine

SERVED = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Stand-ins for both, with TensorRT-RTX's targets."""
    made = {name: RecordingTensorRT(name, version) for name, version in (("tensorrt", "11.0"), ("tensorrt_rtx", "1.7"))}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    members: dict[str, Any] = dict.fromkeys(("NONE", "CURRENT", *SERVED))
    monkeypatch.setattr(made["tensorrt_rtx"], "ComputeCapability", SimpleNamespace(__members__=members), raising=False)
    return dict(made)


def seem_to_have(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, name: str = "") -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_not_installed(flavour: Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, flavour.replace("-", "_"), None)
    with pytest.raises(NoEngine) as refusal:
        load_flavour(flavour)
    assert str(refusal.value) == f'{flavour} is not installed; pip install "diffdfkd[{flavour}]"'


def test_libraries_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(NoEngine, match=r"cannot be loaded \(libnvinfer.so.10: .*\); pip install"):
        load_flavour("tensorrt")


@pytest.mark.parametrize(("flavour", "version"), [("tensorrt", "10.9.0.34"), ("tensorrt-rtx", "1.4.0.76")])
def test_too_old(flavour: Flavour, version: str, modules: dict[str, ModuleType]) -> None:
    modules[flavour.replace("-", "_")].__version__ = version
    with pytest.raises(NoEngine, match=rf"{flavour} is {version} here, .* pip install --upgrade"):
        load_flavour(flavour)


def test_capabilities() -> None:
    assert capabilities("tensorrt-rtx") == SERVED
    assert capabilities("tensorrt") == ()


def test_rtx_module_offers_what_the_documentation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt_rtx")
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    assert set(capabilities("tensorrt-rtx")) >= set(SERVED)
    assert "SM90" not in capabilities("tensorrt-rtx")


def test_here(monkeypatch: pytest.MonkeyPatch) -> None:
    seem_to_have(monkeypatch, (8, 6), "NVIDIA GeForce RTX 3090")
    assert here("tensorrt") == here("tensorrt-rtx") == "SM86"
    seem_to_have(monkeypatch, (9, 0), "NVIDIA H100 80GB HBM3")
    assert here("tensorrt") == "SM90"
    with pytest.raises(
        NoEngine, match=r"no SM90 \(NVIDIA H100 80GB HBM3\); for data-centre cards the engine is tensor"
    ):
        here("tensorrt-rtx")
    seem_to_have(monkeypatch, None)
    with pytest.raises(NoEngine, match=r"tensorrt needs a GPU for this, and torch finds none; use a machine with one$"):
        here("tensorrt")


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    seem_to_have(monkeypatch, None)
    assert targets("tensorrt-rtx", ["SM89", "SM86", "SM89"]) == ("SM89", "SM86")
    for flavour in FLAVOURS:
        with pytest.raises(NoEngine, match="needs a GPU"):
            targets(flavour)
    with pytest.raises(NoEngine, match="needs a GPU"):
        targets("tensorrt", ["SM90"])
    with pytest.raises(NoEngine, match="cannot build for SM35; it can for SM75"):
        targets("tensorrt-rtx", ["SM35"])
    seem_to_have(monkeypatch, (8, 9), "NVIDIA L4")
    assert targets("tensorrt") == targets("tensorrt", ["SM89"]) == targets("tensorrt-rtx") == (CURRENT,)
    assert targets("tensorrt-rtx", ["SM89"]) == ("SM89",)
    with pytest.raises(NoEngine, match="builds for the GPU at hand alone, SM89; to build for SM86, SM89 use"):
        targets("tensorrt", ["SM86", "SM89"])


def test_where_a_plan_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seem_to_have(monkeypatch, None)
    assert (
        runs_on("tensorrt-rtx", ["SM86", "SM120"]) == "GPUs of compute capability 8.6 or 12.0, under tensorrt-rtx 1.7"
    )
    seem_to_have(monkeypatch, (9, 0), "NVIDIA H100 80GB HBM3")
    assert runs_on("tensorrt", [CURRENT]) == "NVIDIA H100 80GB HBM3 (compute capability 9.0), under tensorrt 11.0"


def test_log_goes_to_who_listens(modules: dict[str, ModuleType]) -> None:
    log = log_of(modules["tensorrt"])
    assert log is log_of(modules["tensorrt"])
    assert log is not log_of(modules["tensorrt_rtx"])

    def say(severity: str, message: str) -> None:
        log.logger.log(SimpleNamespace(name=severity), message)

    heard: list[tuple[str, str]] = []
    with log.listening(lambda severity, message: heard.append((severity, message))):
        say("INFO", "a layer")
        say(
            "ERROR",
            "IBuilder::build: Error Code 2: Internal Error ([some.cpp:12: f] No  memory.\n In g at /src/a.cpp:1)",
        )
        assert log.last_errors() == "No memory"
        say("INTERNAL_ERROR", "as it is")
    assert [severity for severity, _ in heard] == ["INFO", "ERROR", "INTERNAL_ERROR"]
    say("ERROR", "afterwards")
    say("ERROR", "afterwards")
    assert len(heard) == 3
    assert log.last_errors() == "as it is; afterwards"
    with log.listening(lambda severity, message: None):
        assert log.last_errors() == "it gave no reason"
