"""``engine=auto`` with made-up timings: when something is tried, what it may cost, and what is taken."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_in_stages import stand_in

from diffdfkd.engine.backends import choose as choose_module
from diffdfkd.engine.backends import identity as identity_module
from diffdfkd.engine.backends.build import Backend, Built, Settings
from diffdfkd.engine.backends.cache import EngineCache
from diffdfkd.engine.backends.choose import (
    FEW_CALLS,
    GAIN,
    SHARE,
    Choice,
    candidates,
    choose,
    settle_engines,
    stage_calls,
)
from diffdfkd.engine.backends.eager import EagerRunner
from diffdfkd.engine.backends.identity import PACKAGES, engine_identity
from diffdfkd.engine.engine_stages import Stage
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.engine.runner import NoEngine, Runner

F32 = torch.float32
MANY = 10**6


class Machine:
    """What is installed, how fast it is and what a build costs, instead of building and timing."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"eager": 1.0}
        self.faults: dict[str, NoEngine] = {}
        self.built: list[str] = []
        self.closed: list[str] = []
        self.clock = 0.0
        self.cost = 0.0
        """Seconds that a build takes."""

    def build(self, make: Any, backend: Backend, precision: torch.dtype, settings: Settings) -> Built:
        self.built.append(backend)
        self.clock += self.cost
        if backend in self.faults:
            raise self.faults[backend]
        machine = self

        class Fake(EagerRunner):
            engine = backend

            def close(self) -> None:
                machine.closed.append(backend)

        return Built(Fake(make(precision)), None, self.cost, False)

    def measure(self, runners: Sequence[Runner], inputs: Any) -> list[float]:
        return [self.seconds[runner.engine] for runner in runners]


class Subject:
    """Of `choose`, as far as it looks at one."""

    precision = F32

    def __init__(self, precision: torch.dtype = F32) -> None:
        self.precision = precision

    def make(self, name: str) -> Callable[[torch.dtype], Stage]:
        return stand_in


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(choose_module, "build", machine.build)
    monkeypatch.setattr(choose_module, "_seconds", machine.measure)
    monkeypatch.setattr(choose_module, "find_spec", lambda name: object() if name != "tensorrt_rtx" else None)
    monkeypatch.setattr(choose_module, "time", SimpleNamespace(perf_counter=lambda: machine.clock))
    return machine


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(EngineCache(tmp_path / "cache"), threads=1)


def take(settings: Settings, calls: int = MANY, precision: torch.dtype = F32) -> Choice:
    return choose("unet", calls, Subject(precision), settings)  # type: ignore[arg-type]


def speeds(machine: Machine, onnxruntime: float, openvino: float, compiled: float) -> None:
    machine.seconds |= {"onnxruntime": onnxruntime, "openvino": openvino, "compiled": compiled}


def test_fastest_is_taken_and_all_that_was_tried_is_told(machine: Machine, settings: Settings) -> None:
    speeds(machine, 0.7, 0.4, 0.5)
    choice = take(settings)
    assert (choice.stage, choice.engine) == ("unet", "openvino")
    assert machine.built == machine.closed == ["onnxruntime", "openvino", "compiled"]
    assert choice.tried == {
        "eager": "1000.0 ms",
        "onnxruntime": "700.0 ms",
        "openvino": "400.0 ms",
        "compiled": "500.0 ms",
    }
    assert choice.reason == "eager 1000.0 ms, onnxruntime 700.0 ms, openvino 400.0 ms, compiled 500.0 ms"


@pytest.mark.parametrize(
    ("best", "taken"), [(1 / GAIN + 0.01, "eager"), (1 / GAIN - 0.01, "onnxruntime"), (2.0, "eager")]
)
def test_a_gain_within_the_noise_is_none(machine: Machine, settings: Settings, best: float, taken: str) -> None:
    speeds(machine, best, 3.0, 3.0)
    assert take(settings).engine == taken


def test_refused_engines_are_reported_and_never_taken(machine: Machine, settings: Settings) -> None:
    speeds(machine, 0.9, 0.01, 0.02)
    machine.faults = {"openvino": NoEngine("its gradient is wrong"), "compiled": NoEngine("there is no compiler")}
    choice = take(settings)
    assert choice.engine == "onnxruntime"
    assert choice.tried["openvino"] == "refused (its gradient is wrong)"
    assert "compiled refused (there is no compiler)" in choice.reason


def test_engines_that_are_not_installed_are_not_tried(
    machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds(machine, 0.5, 0.1, 0.6)
    monkeypatch.setattr(choose_module, "find_spec", lambda name: None if name == "openvino" else object())
    choice = take(settings)
    assert choice.engine == "onnxruntime" and choice.tried["openvino"] == "not installed"
    assert "openvino" not in machine.built


def test_trial_may_spend_a_share_of_the_run(
    machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_module, "SECONDS", {"onnxruntime": 10, "openvino": 20, "compiled": 100})
    speeds(machine, 0.5, 0.5, 0.1)
    machine.cost = 12.0
    # 6 calls beside each build: 16, 26 and 106 s are expected.
    calls = round((16 + 12) / SHARE)
    choice = take(settings, calls)
    assert machine.built == ["onnxruntime"]  # then 28 - 12 are left, of which the next would take 26
    assert choice.tried["openvino"] == "left out (a trial of about 26 s would not pay)"
    assert choice.tried["compiled"] == "left out (a trial of about 106 s would not pay)"
    assert choice.engine == "onnxruntime"


def test_slow_calls_make_builds_of_large_networks_expected(machine: Machine, settings: Settings) -> None:
    machine.seconds["eager"] = 10.0
    choice = take(settings, 100)  # 100 s may be spent
    assert machine.built == []
    assert choice.tried["onnxruntime"] == f"left out (a trial of about {40 * 5 + 60} s would not pay)"
    assert choice.engine == "eager"


def test_a_kept_engine_costs_a_few_calls_alone(
    machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds(machine, 0.5, 0.5, 0.5)
    settings.cache.obtain("onnxruntime", engine_identity(stand_in(), "onnxruntime", F32, settings), lambda folder: {})
    choice = take(settings, round(10 / SHARE))
    assert machine.built == ["onnxruntime"] and choice.engine == "onnxruntime"


def test_trials_are_remembered_and_cost_nothing_again(machine: Machine, settings: Settings) -> None:
    speeds(machine, 0.5, 0.4, 0.6)
    machine.faults = {"openvino": NoEngine("its gradient is wrong", lasting=True)}
    first = take(settings)
    machine.built.clear()
    machine.faults.clear()
    # Even a run that could pay for no trial; what is remembered is how much faster, not the seconds of that day.
    machine.seconds["eager"] = 2.0
    again = take(settings, FEW_CALLS)
    assert machine.built == []
    assert again.engine == first.engine == "onnxruntime"
    assert again.tried["onnxruntime"] == "1000.0 ms" and again.tried["compiled"] == "1200.0 ms"
    assert again.tried["openvino"] == "refused (its gradient is wrong)"


@pytest.mark.parametrize("cause", ["there is no compiler", "it does not fit into memory", "is not installed"])
def test_refusal_that_may_pass_is_not_remembered(machine: Machine, settings: Settings, cause: str) -> None:
    speeds(machine, 0.5, 0.4, 0.6)
    machine.faults = {"openvino": NoEngine(cause)}
    assert take(settings).tried["openvino"] == f"refused ({cause})"
    machine.built.clear()
    machine.faults.clear()
    again = take(settings)
    assert machine.built == ["openvino"]  # what the others came to is still known
    assert again.engine == "openvino"


def test_trial_that_ran_out_of_memory_beside_eager_is_not_remembered(
    machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds(machine, 0.5, 0.4, 0.6)

    def full(runners: Sequence[Runner], inputs: Any) -> list[float]:
        if runners[-1].engine == "openvino":
            raise RuntimeError("std::bad_alloc")
        return machine.measure(runners, inputs)

    monkeypatch.setattr(choose_module, "_seconds", full)
    choice = take(settings)
    assert choice.engine == "onnxruntime" and choice.tried["openvino"] == "refused (RuntimeError: std::bad_alloc)"
    assert "openvino" in machine.closed
    monkeypatch.setattr(choose_module, "_seconds", machine.measure)
    assert take(settings).engine == "openvino"


def test_interrupted_trial_leaves_nothing(
    machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(choose_module, "build", interrupt)
    with pytest.raises(KeyboardInterrupt):
        take(settings)
    assert not settings.cache.folder.exists()


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Packages as if they were of these versions, the others as they are."""
    real = identity_module._installed
    monkeypatch.setattr(identity_module, "_installed", lambda name: versions[name] if name in versions else real(name))


CASES: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "diffdfkd": lambda patch: installed(patch, diffdfkd="9.9"),
    "sources of ours": lambda patch: patch.setattr(identity_module, "sources_digest", lambda names: "another"),
    "exporter": lambda patch: installed(patch, onnxscript="9.9"),
    "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
    "device": lambda patch: patch.setattr(identity_module, "device_identity", lambda device: "another"),
    "stage": lambda patch: patch.setattr(Subject, "make", lambda self, stage: lambda dtype: stand_in(digest="1" * 64)),
    **{
        package: lambda patch, package=package: installed(patch, **{package: "9.9"})
        for packages in PACKAGES.values()
        for package in packages
        if package != "torch"  # which the exporter names, by its own word
    },
}


@pytest.mark.parametrize("case", CASES)
def test_trial_of_another_case_is_not_used(
    machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Nor is a refusal: each may be gone with any of what it depends on."""
    settings = Settings(settings.cache)
    speeds(machine, 0.5, 0.5, 0.5)
    machine.faults = {"openvino": NoEngine("wrong", lasting=True)}
    take(settings)
    machine.built.clear()
    CASES[case](monkeypatch)
    take(settings)
    assert machine.built == ["onnxruntime", "openvino", "compiled"]


def test_package_that_is_installed_later_ends_what_was_found_without(
    machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds(machine, 0.5, 0.5, 0.5)
    installed(monkeypatch, tensorrt=None)
    take(settings)
    machine.built.clear()
    take(settings)
    assert machine.built == []
    installed(monkeypatch, tensorrt="10.13")
    take(settings)
    assert machine.built == ["onnxruntime", "openvino", "compiled"]


def test_trial_of_another_precision_or_number_of_threads_is_not_used(machine: Machine, settings: Settings) -> None:
    speeds(machine, 0.5, 0.5, 0.5)
    for case, precision in ((settings, F32), (settings, torch.bfloat16), (Settings(settings.cache, threads=2), F32)):
        machine.built.clear()
        take(case, precision=precision)
        assert machine.built == ["onnxruntime", "openvino", "compiled"]


def test_eager_is_never_asked_to_prove_itself(machine: Machine, settings: Settings) -> None:
    """A network that is far from float32 in the run's own precision must not stop a run that asked for nothing."""
    speeds(machine, 0.5, 0.5, 0.5)
    machine.faults = {
        name: NoEngine("too far from float32") for name in ("eager", "onnxruntime", "openvino", "compiled")
    }
    assert take(settings, precision=torch.bfloat16).engine == "eager"


def in_place_of(folder: Path) -> None:
    folder.write_text("a file")


def of_others(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def of_others_within(folder: Path) -> None:
    (folder / "trial").mkdir(parents=True)
    (folder / "trial").chmod(0o770)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (in_place_of, "Not a directory"),
        (of_others, "may be written by others (mode 777)"),
        (of_others_within, "may be written by others (mode 770)"),
    ],
)
def test_cache_that_cannot_be_read_leaves_eager(
    machine: Machine, settings: Settings, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(settings.cache.folder)
    speeds(machine, 0.1, 0.1, 0.1)
    choice = take(settings)
    assert choice.engine == "eager" and machine.built == []
    for engine in ("onnxruntime", "openvino", "compiled"):
        assert choice.tried[engine].startswith("left out (engine.cache: ") and said in choice.tried[engine]
    assert said in choice.reason


@pytest.mark.parametrize(
    "fault",
    [
        UserError("engine.cache: /somewhere cannot be used (Read-only file system)"),
        OSError(28, "No space left on device", "/tmp/of a compiler"),
    ],
)
def test_disk_that_cannot_be_written_leaves_eager(
    machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def refuse(*_: Any) -> Any:
        raise fault

    speeds(machine, 0.1, 0.1, 0.1)
    monkeypatch.setattr(choose_module, "build", refuse)
    choice = take(settings)
    assert choice.engine == "eager"
    assert choice.tried["onnxruntime"] == f"left out ({fault})"


def test_trial_that_cannot_be_remembered_still_counts(
    machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a disk that is read only, or full, and holds the engine."""

    def full(self: EngineCache, *_: Any) -> Any:
        raise UserError("engine.cache: it is full")

    monkeypatch.setattr(EngineCache, "obtain", full)
    speeds(machine, 0.5, 0.4, 0.6)
    assert take(settings).engine == "openvino"
    told = "engine=auto: what openvino came to for the unet is not remembered: engine.cache: it is full"
    assert told in caplog.messages


def test_no_folder_for_the_cache_leaves_eager(
    asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless(recipe: Recipe) -> Settings:
        raise UserError("engine.cache: no home folder is known here")

    monkeypatch.setattr(choose_module, "run_settings", homeless)
    engines, choices = settle(recipe("guidance.window=[0.0,1.0]"))
    assert engines == ("eager", "eager") and not asked
    assert choices[0].reason == "engines cannot be kept (engine.cache: no home folder is known here)"
    assert "engine=auto: eager is taken for the unet: engine.cache: no home folder is known here" in caplog.messages


def test_batch_that_eager_has_no_memory_for_is_named(
    machine: Machine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(choose_module, "_seconds", full)
    with pytest.raises(UserError, match=r"^synthesis\.batch_size: a batch of 4 rows .*; give a smaller one"):
        take(settings)


def test_candidates_by_device() -> None:
    assert set(candidates(torch.device("cpu"))) == {"onnxruntime", "openvino", "compiled"}
    assert set(candidates(torch.device("cuda"))) == {"compiled", "onnxruntime", "tensorrt", "tensorrt-rtx"}


def recipe(*overrides: str) -> Recipe:
    content = {
        "prior": "nowhere",
        "teacher": {"architecture": "small_cnn", "classes": ["a", "b", "c"], "weights": "w"},
        "student": {"architecture": "small_cnn"},
        "synthesis": {"images_per_class": 40, "batch_size": 12, "steps": 10},
        "guidance": {"window": [0.0, 0.5]},
    }
    return load_recipe(content, ["rounds=2", *overrides])


def test_calls_of_a_run() -> None:
    # Two rounds of 60 images are 5 batches each, guided in the first half of their steps.
    assert stage_calls(recipe()) == {"unet": 100, "chain": 50}
    assert stage_calls(recipe("guidance.every=2")) == {"unet": 100, "chain": 30}
    assert stage_calls(recipe("guidance.mode=none")) == {"unet": 100}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Stages that a trial was held for, and their calls; onnxruntime wins each."""
    held: list[tuple[str, int]] = []

    def hold(stage: str, calls: int, subject: Any, settings: Settings) -> Choice:
        assert subject == "subject"
        held.append((stage, calls))
        return Choice(stage, "onnxruntime", "it is faster", {"eager": "1 ms"})

    monkeypatch.setattr(choose_module, "choose", hold)
    return held


def settle(settings: Recipe) -> tuple[tuple[str, str], list[Choice]]:
    made, choices = settle_engines(settings, lambda: "subject")  # type: ignore[arg-type, return-value]
    assert made.model_copy(update={"engine": settings.engine}) == settings
    return (made.engine.unet, made.engine.chain), choices


def test_short_run_is_eager_at_once(asked: list[tuple[str, int]]) -> None:
    def never() -> Any:
        raise AssertionError("looked at the networks")

    short = recipe("synthesis.images_per_class=2")
    made, choices = settle_engines(short, never)
    assert (made.engine.unet, made.engine.chain) == ("eager", "eager") and not asked
    assert [choice.reason for choice in choices] == [
        "20 calls are too few for a trial",
        "10 calls are too few for a trial",
    ]


def test_each_stage_is_settled_by_its_own_calls(asked: list[tuple[str, int]]) -> None:
    engines, choices = settle(recipe())
    assert engines == ("onnxruntime", "eager")  # 100 calls, and 50
    assert asked == [("unet", 100)]
    assert [choice.engine for choice in choices] == ["onnxruntime", "eager"]
    assert settle(recipe("guidance.window=[0.0,1.0]"))[0] == ("onnxruntime", "onnxruntime")


@pytest.mark.parametrize("mode", ["exact", "reuse"])
def test_unet_that_gradients_go_through_is_eager(asked: list[tuple[str, int]], mode: str) -> None:
    engines, choices = settle(recipe(f"guidance.mode={mode}", "guidance.window=[0.0,1.0]"))
    assert engines == ("eager", "onnxruntime") and asked == [("chain", 100)]
    assert choices[0].reason == f"guidance.mode={mode} takes gradients through it"


def test_micro_batches_are_eager(asked: list[tuple[str, int]]) -> None:
    engines, choices = settle(recipe("guidance.micro_batch=1"))
    assert engines == ("eager", "eager") and not asked
    assert {choice.reason for choice in choices} == {"guidance.micro_batch splits its batches"}


def test_run_without_guidance_has_no_chain(asked: list[tuple[str, int]]) -> None:
    engines, choices = settle(recipe("guidance.mode=none"))
    assert engines == ("onnxruntime", "eager") and [choice.stage for choice in choices] == ["unet"]


def test_named_engines_are_left_alone(asked: list[tuple[str, int]]) -> None:
    assert settle(recipe("engine=openvino"))[0] == ("openvino", "openvino")
    assert not asked
    half = recipe("engine.unet=compiled", "guidance.window=[0.0,1.0]")
    assert settle(half)[0] == ("compiled", "onnxruntime")
    assert asked == [("chain", 100)]
    assert settle(recipe("engine=openvino", "guidance.mode=none"))[0] == ("openvino", "openvino")


def test_real_timing_is_the_median_of_interleaved_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is called once before, without a look at the clock's end."""
    clock = iter(float(second) for second in (0, 0, 0, 1, 0, 5, 0, 3, 0, 4, 0, 2, 0, 9))
    monkeypatch.setattr(choose_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    runners = [EagerRunner(stand_in()), EagerRunner(stand_in())]
    assert choose_module._seconds(runners, stand_in().examples(4, 0)) == [2.0, 5.0]
