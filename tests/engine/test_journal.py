import json
from dataclasses import fields

import pytest

from diffdfkd.engine.alarms import Signs
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import Journal, _Signs, read_journal


def test_events_come_back_in_order_across_two_runs(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with Journal(path) as journal:
        journal.log("preview", samples=4, seconds=1.5)
    with Journal(path) as journal:
        journal.scalar("loss", 0.25, step=7)
    first, second = read_journal(path)
    assert (first["event"], first["samples"], first["seconds"]) == ("preview", 4, 1.5)
    assert (second["event"], second["name"], second["value"], second["step"]) == ("scalar", "loss", 0.25, 7)
    assert first["time"] <= second["time"]


@pytest.mark.parametrize("torn", ['{"event": "sh', "x" * 10_000])
def test_torn_last_line_is_left_out_and_cut_before_the_next(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "a", "time": 1}\n' + torn)
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
    path.write_text('{"event": "a", "time": 1\n{"event": "b", "time": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is damaged; take the line out"):
        read_journal(path)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("[1]", ""),
        ('{"time": 1}', " (event)"),
        ('{"event": ["a"], "time": 1}', " (event)"),
        ('{"event": "a"}', " (time)"),
        ('{"event": "a", "time": "1"}', " (time)"),
        ('{"event": "scalar", "time": 1, "name": "loss", "value": 1}', " (step)"),
        ('{"event": "scalar", "time": 1, "name": 5, "value": 1, "step": 1}', " (name)"),
        ('{"event": "stage", "time": 1, "stage": "export", "seconds": null}', " (seconds)"),
        ('{"event": "session", "time": 1, "seconds_before": []}', " (seconds_before)"),
        ('{"event": "shard", "time": 1, "round": 0, "shard": 0, "images": 1, "seconds": 1, "losses": 3}', " (losses)"),
        ('{"event": "shard", "time": 1, "round": 0, "shard": 0, "images": 1, "seconds": 1, "signs": {}}', " (signs)"),
        ('{"event": "alarm", "time": 1, "kind": "saturation", "message": null}', " (message)"),
        ('{"event": "distillation", "time": 1, "seconds": "long"}', " (seconds)"),
        ("[" * 100_000, ""),
    ],
)
def test_a_line_of_another_form_is_named_by_its_field(tmp_path, line, field):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "a", "time": 1}\n' + line + "\n")
    with pytest.raises(UserError) as refused:
        read_journal(path)
    assert str(refused.value).startswith(f"{path}: line 2 is damaged{field}; take the line out")


def test_signs_are_those_of_the_alarms():
    assert list(_Signs.model_fields) == [field.name for field in fields(Signs)]


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
