"""What this machine offers for a run, in words and as JSON: ``diffdfkd doctor``."""

import json
import platform
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffdfkd.engine.errors import UserError
from diffdfkd.recipes.command import refuse_json
from diffdfkd.recipes.extras import examine_extras, install_command, installed, required
from diffdfkd.recipes.machine import examine_disk, examine_gpu, examine_launchers, examine_memory, examine_processor

WIDTH = 100

LAUNCHERS = {
    "torchrun": "several processes for diffdfkd distill on one or more machines",
    "deepspeed": "the same, with DeepSpeed's own launcher",
    "mpirun": "DeepSpeed's other way to several machines; not needed on one",
}


def doctor(*, json_file: Path | None = None) -> str:
    """The findings as text of at most 100 columns; writes them to ``json_file`` too.

    Nothing is installed, fetched or changed. Raises UserError where the file cannot be written.
    """
    refuse_json(json_file)
    findings = examine()
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(findings, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json: {json_file} cannot be written ({error.strerror}); name another file") from None
    return "\n".join(_lines(findings))


def examine() -> dict[str, Any]:
    """Everything that is found, JSON-ready; sizes in bytes."""
    core, _ = required()
    gpu = examine_gpu()
    packages = [installed(requirement) for requirement in core]
    mend = [line for line, package in zip(core, packages, strict=True) if not package["fits"]]
    return {
        "processor": examine_processor(),
        "memory": examine_memory(),
        "disk": examine_disk(Path.cwd()),
        "gpu": gpu,
        "kernel": _kernels(bool(gpu["devices"])),
        "launchers": examine_launchers(),
        "python": {"version": platform.python_version(), "system": platform.platform()},
        "packages": packages,
        "mend": install_command(mend) if mend else None,
        "extras": examine_extras(bool(gpu["devices"])),
    }


def _lines(found: Mapping[str, Any]) -> Iterable[str]:
    processor, memory, disk = found["processor"], found["memory"], found["disk"]
    yield _line("processor", f"{processor['model']}; {', '.join(processor['features']) or 'no vector features known'}")
    quota = processor["core_quota"]
    limited = f", {quota:g} cores' worth of time" if quota is not None else ""
    yield _line("cores", f"{processor['usable_cores']} usable of {processor['cores']}{limited}")
    limit = f", limited to {_gib(memory['limit'])} by the control group" if memory["limit"] is not None else ""
    yield _line("memory", f"{_gib(memory['total'])}, {_gib(memory['available'])} available{limit}")
    yield _line("disk", f"{_gib(disk['free'])} free at {disk['folder']}")
    yield from _gpu(found["gpu"])
    yield _line("kernels", found["kernel"]["words"])
    for name, there in found["launchers"].items():
        yield _line(name, f"{'found' if there else 'not found'}: {LAUNCHERS[name]}")
    yield _line("python", f"{found['python']['version']} on {found['python']['system']}")
    yield from _packages(found)
    yield ""
    yield "optional packages"
    for name, extra in found["extras"].items():
        yield ""
        yield from _extra(name, extra)


def _kernels(gpu: bool) -> dict[str, str]:
    """Which form of the operations between the networks ``kernel=auto`` takes here, and why."""
    from diffdfkd.kernels.launch import launch_fault

    fault = launch_fault() if gpu else "the fused Triton kernels need a CUDA GPU"
    if fault is None:
        return {"auto": "triton", "words": "kernel=auto takes kernel=triton, the fused kernels"}
    return {"auto": "reference", "words": f"kernel=auto takes kernel=reference, plain torch: {fault}"}


def _gpu(gpu: Mapping[str, Any]) -> Iterable[str]:
    for device in gpu["devices"]:
        yield _line(
            "GPU",
            f"{device['name']}, {_gib(device['memory'])} ({_gib(device['free'])} free), compute capability "
            f"{device['compute_capability']}, driver {gpu['driver'] or 'unknown'}, torch for CUDA "
            f"{gpu['cuda_of_torch']}",
        )
    if gpu["missing"]:
        yield _line(
            "GPU",
            f"none: {gpu['missing']}. The demo and small priors run on the CPU; priors of Stable Diffusion's size "
            "want a GPU",
        )


def _packages(found: Mapping[str, Any]) -> Iterable[str]:
    packages = found["packages"]
    yield _line("packages", ", ".join(f"{entry['name']} {entry['version'] or 'MISSING'}" for entry in packages))
    wrong = [
        f"{entry['name']} {entry['version'] or 'is missing'}, tested with {entry['range']}"
        for entry in packages
        if not entry["fits"]
    ]
    if wrong:
        yield _line("", f"NOT in the tested ranges: {'; '.join(wrong)}")
        yield f"{'':11}{found['mend']}"
    else:
        yield _line("", "all in the tested ranges")


def _extra(name: str, extra: Mapping[str, Any]) -> Iterable[str]:
    versions = ", ".join(f"{entry['name']} {entry['version']}" for entry in extra["packages"] if entry["version"])
    if extra["usable"]:
        state = f"usable ({versions})"
    elif extra["installed"]:
        state = f"installed ({versions}) but not usable here: {extra['reason']}"
    else:
        state = extra["reason"]
    yield from textwrap.wrap(f"{name}: {state}", WIDTH, initial_indent="  ", subsequent_indent="      ")
    yield from textwrap.wrap(
        f"brings {extra['brings']}; {extra['used']}", WIDTH, initial_indent="    ", subsequent_indent="      "
    )
    if not all(entry["fits"] for entry in extra["packages"]):
        # Never wrapped, since it is there to be copied.
        yield f"    {extra['install']}"


def _line(name: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"{name:<11}", subsequent_indent=" " * 11, break_on_hyphens=False)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
