"""What the documentation shows is run as it stands, on the tiny recipe."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffdfkd.engine import recipe
from diffdfkd.recipes.same_recipe import MAY_DIFFER

DOCS = Path(recipe.__file__).resolve().parent.parent / "docs"


def test_the_python_of_the_api_page_runs(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "api.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block.replace('"fashion"', repr(str(tiny_recipe))), "docs/api.md", "exec"), names)
    assert (tmp_path / "runs" / "api" / "report.html").is_file()
    assert (tmp_path / "runs" / "api" / "result.json").is_file()


def test_the_page_on_errors_names_every_field_that_may_differ() -> None:
    table = (DOCS / "errors.md").read_text(encoding="utf-8").partition("<!-- may-differ -->")[2].partition("\n\n")[0]
    fields = [field for row in table.splitlines()[3:] for field in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert sorted(fields) == sorted([*MAY_DIFFER, "about.*"])


def page_blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """(mark, language, content) of each block of a page in order; the mark is that of a comment above it, or empty."""
    blocks = re.finditer(r"(?:<!-- (\S+) -->\n)?```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        yield block[1] or "", block[2], block[3]


def test_the_page_for_own_teachers_installs_as_the_readme_does() -> None:
    marked = {mark: content for mark, _, content in page_blocks(DOCS / "own-teacher.md") if mark}
    readme = {mark: content for mark, _, content in page_blocks(DOCS.parent / "README.md") if mark}
    assert readme["install-and-run"].startswith(marked["install"].rstrip("\n"))


def run_page(page: Path, folder: Path) -> list[str]:
    """Run the blocks of a page in order, as in one shell: bash, python, and files that are named above a block.

    What the first two blocks do, install and activate, is done already. Returns what each bash block printed.
    """
    here, printed = folder, []
    beside = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for mark, language, content in page_blocks(page):
        if mark in ("install", "activate"):
            continue
        if mark:
            (here / mark).write_text(content, encoding="utf-8")
        elif language in ("bash", "python"):
            where = folder / "where"
            command = [sys.executable, "-c", content]
            if language == "bash":
                command = ["bash", "-euo", "pipefail", "-c", f"{content}\npwd > {where}"]
            done = subprocess.run(command, cwd=here, env=beside, capture_output=True, text=True)
            assert done.returncode == 0, f"{content}\n{done.stdout}\n{done.stderr}"
            printed += [done.stdout] if language == "bash" else []
            here = Path(where.read_text().strip()) if where.is_file() else here
        else:
            raise AssertionError(f"a block in {language} without a name: {content}")
    return printed


@pytest.mark.slow
def test_the_page_for_own_teachers_runs_as_it_stands(tmp_path: Path) -> None:
    printed = run_page(DOCS / "own-teacher.md", tmp_path)
    made = tmp_path / "own-teacher"
    result = json.loads((made / "runs" / "mine" / "result.json").read_text())
    assert (result["images"], result["test_images"]) == (400, 100)
    # Ten classes: far above chance, so that class order and preprocessing were right all the way.
    assert result["teacher_accuracy"] > 0.6 and result["student_accuracy"] > 0.4
    figures = json.loads((made / "figures.json").read_text())
    assert figures["accuracy"] == result["student_accuracy"]
    for name in ("report.html", "student/student.onnx", "student/README.md"):
        assert (made / "runs" / "mine" / name).is_file()
    assert (made / "runs" / "mine-preview" / "preview.png").is_file()
    assert len(list((made / "my-images").rglob("*.png"))) == 400
    assert any("nothing is missing" in text for text in printed)
