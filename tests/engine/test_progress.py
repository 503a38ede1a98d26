import io

import pytest
from tqdm import tqdm

from diffdfkd.engine import progress
from diffdfkd.engine.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, every: float, shown: bool = True) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "EVERY", every)
    with progress_bar(100, "synthesis", unit="images", shown=shown, done=20) as bar:
        for _ in range(8):
            bar.update(10)
        bar.set_postfix(loss="0.5", refresh=False)
        with tqdm.external_write_mode():
            stream.write("alarm\n")
    return stream.getvalue()


def test_a_log_gets_whole_lines(monkeypatch):
    text = drawn(monkeypatch, io.StringIO(), every=0)
    lines = text.splitlines()
    assert "\r" not in text and text.endswith("\n") and all(lines)
    counts = [int(line.split()[1]) for line in lines if line != "alarm"]
    assert counts == [*range(20, 101, 10), 100] and "alarm" in lines  # the last once more, with its loss
    assert lines[0].startswith("synthesis: 20 of 100 images after 00:00, ") and lines[-1].endswith(", loss=0.5")


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    lines = drawn(monkeypatch, io.StringIO(), every=3600).splitlines()
    assert [line.split()[1] for line in lines if line != "alarm"] == ["20", "100"]


def test_a_terminal_gets_one_line_that_changes(monkeypatch):
    text = drawn(monkeypatch, Terminal(), every=3600)
    assert text.count("\r") > 1 and "100/100" in text and "images/s" in text


def test_a_process_without_standard_error_goes_on(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    for shown in (True, False):
        with progress_bar(2, "synthesis", unit="images", shown=shown) as bar:
            bar.update(2)


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_nothing_where_it_is_not_shown(monkeypatch, stream):
    assert drawn(monkeypatch, stream, every=0, shown=False) == "alarm\n"
