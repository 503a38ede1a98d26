"""What the documentation shows is run as it stands, on the tiny recipe."""

import re
from pathlib import Path

import pytest

from diffdfkd.engine import recipe

DOCS = Path(recipe.__file__).resolve().parent.parent / "docs"


def test_the_python_of_the_api_page_runs(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "api.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block.replace('"fashion"', repr(str(tiny_recipe))), "docs/api.md", "exec"), names)
    assert (tmp_path / "runs" / "api" / "report.html").is_file()
    assert (tmp_path / "runs" / "api" / "result.json").is_file()
