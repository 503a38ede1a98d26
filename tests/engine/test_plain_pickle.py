import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import python2_pickle

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.plain_pickle import read_plain_pickle

ARRAY = np.arange(600, dtype=np.uint8).reshape(2, 300)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_as_python_2_wrote_it(tmp_path: Path) -> None:
    held = read_plain_pickle(
        write(tmp_path / "p", python2_pickle({"data": ARRAY, "labels": [3, 500, -1], "batch_label": "x" * 300}))
    )
    assert np.array_equal(held.pop("data"), ARRAY)
    assert held == {"labels": [3, 500, -1], "batch_label": b"x" * 300}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("array", [ARRAY, np.asfortranarray(ARRAY), ARRAY.astype(np.int64)])
def test_as_numpy_writes_it_today(tmp_path: Path, protocol: int, array: np.ndarray) -> None:
    path = write(tmp_path / "p", pickle.dumps({b"data": array, "names": ["a", "b"]}, protocol))
    held = read_plain_pickle(path)
    assert held["data"].dtype == array.dtype and np.array_equal(held["data"], array) and held["names"] == ["a", "b"]


class Hostile:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "ran"
    for hostile in (Hostile(os.system, f"touch {mark}"), Hostile(open, str(mark), "w"), Hostile(eval, "1")):
        for content in ({"data": ARRAY, "x": hostile}, hostile, [hostile]):
            path = write(tmp_path / "test_batch", pickle.dumps(content, protocol))
            with pytest.raises(UserError, match=r"it asks for \w+\.\w+\), and not executed") as caught:
                read_plain_pickle(path)
            assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "Ran out of input"),
        (b"\x80\x02}q", "pickle"),
        (python2_pickle({"data": ARRAY})[:-40], "pickle"),
        (python2_pickle([1, 2]), "it holds a list"),
        (python2_pickle({"data": ARRAY}).replace(b"U\x02u1", b"U\x02O8"), "an array that is not of u1"),
        (python2_pickle({"data": ARRAY}).replace(b"K\x02M", b"K\x03M").replace(b"K\x02J", b"K\x03J"), "of 600 bytes"),
        (b"\x80\x02}(U\x01acnumpy\nndarray\nK\x05\x85Ru.", "it calls numpy.ndarray"),
        (b"\x80\x02}(U\x01acnumpy\ndtype\n}(U\x01xK\x01ubu.", "it changes a name"),
        (b"\x80\x02}(U\x01ac_codecs\nencode\n(X\x01\x00\x00\x00aU\x05rot13tRu.", "it encodes to"),
    ],
)
def test_what_is_damaged_or_odd_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        read_plain_pickle(write(tmp_path / "p", content))
    with pytest.raises(UserError, match="cannot be read"):
        read_plain_pickle(tmp_path / "absent")
