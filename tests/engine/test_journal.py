import json

import pytest

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import Journal, read_journal


def test_events_come_back_in_order_across_two_runs(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with Journal(path) as journal:
        journal.log("shard", index=0, seconds=1.5)
    with Journal(path) as journal:
        journal.scalar("loss", 0.25, step=7)
    first, second = read_journal(path)
    assert (first["event"], first["index"], first["seconds"]) == ("shard", 0, 1.5)
    assert (second["event"], second["name"], second["value"], second["step"]) == ("scalar", "loss", 0.25, 7)
    assert first["time"] <= second["time"]


@pytest.mark.parametrize("torn", ['{"event": "sh', "x" * 10_000])
def test_torn_last_line_is_left_out_and_cut_before_the_next(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "a"}\n' + torn)
    assert [event["event"] for event in read_journal(path)] == ["a"]
    with Journal(path) as journal:
        journal.log("b")
    assert [event["event"] for event in read_journal(path)] == ["a", "b"]


def test_file_that_is_one_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"eve')
    assert read_journal(path) == []
    Journal(path).close()
    assert path.read_bytes() == b""


def test_a_damaged_line_in_the_middle_is_not_hidden(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "a"\n{"event": "b"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is damaged; take the line out"):
        read_journal(path)


def test_lines_are_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Journal(path) as journal:
        journal.log("losses", values=[float("nan"), 1.0], total=float("inf"))
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["values"] == [None, 1.0]


def test_tensorboard_gets_the_scalars(tmp_path):
    with Journal(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "tensorboard") as journal:
        journal.scalar("loss", 0.5, step=1)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
