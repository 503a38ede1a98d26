"""Time of a run over sessions, killed ones included."""

from typing import Any

from diffdfkd.engine.accounts import accounts


def rows(*events: tuple[float, str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"time": time, "event": event, **fields} for time, event, fields in events]


def test_sessions_add_up_without_the_pause_between_them() -> None:
    account = accounts(
        rows(
            (100.0, "session", {"seconds_before": 5.0}),
            (110.0, "shard", {"round": 0, "shard": 0, "images": 20, "seconds": 10.0}),
            # killed; an hour later
            (3710.0, "session", {"seconds_before": 4.0}),
            (3715.0, "shard", {"round": 0, "shard": 1, "images": 20, "seconds": 5.0}),
            (3716.0, "stage", {"stage": "synthesis", "seconds": 6.0, "peak_memory_mib": 300.0}),
        )
    )
    assert account.wall_seconds == 5 + 10 + 4 + 6
    assert account.sessions == 2
    assert (account.images, account.synthesis_seconds) == (40, 15.0)
    assert account.images_per_second == 40 / 15
    assert account.peak_memory_mib == 300.0


def test_a_shard_made_again_counts_once_with_its_last_time() -> None:
    shard = {"round": 0, "shard": 0, "images": 10}
    account = accounts(rows((0.0, "shard", {**shard, "seconds": 9.0}), (1.0, "shard", {**shard, "seconds": 2.0})))
    assert (account.images, account.synthesis_seconds) == (10, 2.0)


def test_killed_distillation_counts_to_its_last_report() -> None:
    account = accounts(
        rows(
            (0.0, "session", {}),
            (1.0, "distill_start", {}),
            (7.0, "distill", {}),
            (50.0, "session", {}),
            (51.0, "distill_start", {}),
            (60.0, "distill", {}),
            (61.0, "distillation", {"seconds": 10.5}),
        )
    )
    assert account.distillation_seconds == 6.0 + 10.5


def test_a_distillation_that_found_all_steps_done_adds_nothing() -> None:
    trained = {"start_step": 0, "steps": 100, "seconds": 10.0}
    later = {"start_step": 40, "steps": 100, "seconds": 7.0}
    nothing = {"start_step": 100, "steps": 100, "seconds": 3.0}
    account = accounts(
        rows(*((float(time), "distillation", row) for time, row in enumerate((trained, later, nothing))))
    )
    assert account.distillation_seconds == 17.0


def test_no_rows() -> None:
    account = accounts([])
    assert (account.wall_seconds, account.images_per_second, account.peak_memory_mib) == (0.0, None, None)
