"""The package: every source folder is shipped, and none of them hides another package's name."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUTSIDE = {"tests", "docs", "build", "dist", "typings", "runs"}


def source_folders() -> set[str]:
    """Folders with modules, as dotted names below the package."""
    folders = {
        path.parent.relative_to(ROOT)
        for top in ROOT.iterdir()
        if top.is_dir() and top.name not in OUTSIDE and top.name[0] not in "._" and not (top / "pyvenv.cfg").exists()
        for path in top.rglob("*.py")
    }
    return {f"diffdfkd.{'.'.join(folder.parts)}" for folder in folders if "__pycache__" not in folder.parts}


def test_every_source_folder_is_listed() -> None:
    listed = re.search(r"\bpackages=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert listed is not None
    names = set(re.findall(r'"(diffdfkd\.[\w.]+)"', listed.group(1)))
    assert source_folders() <= names
    assert {name for name in names if not (ROOT / name.removeprefix("diffdfkd.").replace(".", "/")).is_dir()} == set()


def test_no_init_file_crept_in() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = tracked.stdout.splitlines() if tracked.returncode == 0 else []
    folders = [ROOT / name.removeprefix("diffdfkd.").replace(".", "/") for name in source_folders()]
    files += [str(file) for folder in [*folders, ROOT] for file in folder.glob("__init__.py")]
    assert [file for file in files if file.endswith("__init__.py")] == []
