"""The estimate of the remaining time."""

import pytest

from pipeline.engine.progress import Progress


class Clock:
    """Seconds that a test sets."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def progress_of(sizes: list[int], clock: Clock, workers: int = 1) -> Progress:
    """Progress of a stage whose workers needed 30 s to start, with `workers` tasks under way."""
    progress = Progress("test", len(sizes), sum(sizes), sum(sizes), clock=clock)
    clock.seconds = 30.0
    for _ in range(workers):
        progress.task_started()
    return progress


@pytest.mark.parametrize("sizes", [[100] * 10, [300, 200, 200, 100, 100, 50, 50], [0] * 10])
def test_constant_speed_gives_the_exact_time_from_the_first_task_on(sizes: list[int]) -> None:
    clock = Clock()
    progress = progress_of(sizes, clock)
    work = [size or 1 for size in sizes]
    for number, size in enumerate(sizes[:-1], 1):
        clock.seconds += work[number - 1] * 0.5
        progress.advance(size)
        assert progress.seconds_left() == pytest.approx(0.5 * sum(work[number:]))


def test_there_is_no_estimate_before_a_task_has_finished_and_after_the_last() -> None:
    clock = Clock()
    progress = progress_of([100], clock)
    clock.seconds += 1000
    assert progress.seconds_left() is None
    progress.advance(100)
    assert progress.seconds_left() is None


def test_there_is_no_estimate_from_tasks_that_are_a_tiny_share_of_the_work() -> None:
    clock = Clock()
    progress = progress_of([1, 1, 1, 10_000, 10_000], clock)
    for _ in range(3):
        clock.seconds += 1
        progress.advance(1)
    assert progress.seconds_left() is None
    clock.seconds += 97
    progress.advance(10_000)
    assert progress.seconds_left() == pytest.approx(100, rel=0.01)


def test_parallel_tasks_count_once_a_whole_round_has_finished() -> None:
    clock = Clock()
    progress = progress_of([100] * 12, clock, workers=4)
    clock.seconds += 10
    for _ in range(3):
        progress.advance(100)
    assert progress.seconds_left() is None
    progress.advance(100)
    assert progress.seconds_left() == pytest.approx(20)


def test_lines_name_the_stage_what_is_done_and_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("compress", 4, 40, 400, "files", clock) as progress:
        progress.task_started()
        clock.seconds += 6
        progress.tick()
        progress.advance(10, 100)
        clock.seconds += 6
        progress.tick()
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("compress: 0 of 4 files")
    assert "left" not in first
    assert second.startswith("compress: 1 of 4 files, 100 bytes of 400 bytes")
    assert second.endswith("about 36 s left")


def test_the_remaining_time_follows_the_work_and_not_the_bytes() -> None:
    """A file that is only copied has most bytes and least work."""
    clock = Clock()
    progress = Progress("compress", 3, work=10 + 10 + 0.1, nbytes=1 + 1 + 1000, clock=clock)
    progress.task_started()
    clock.seconds += 20
    progress.advance(10, 1)
    assert progress.seconds_left() == pytest.approx(20.2)


def test_a_line_shows_what_is_under_way_until_something_has_finished(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("calibrate", 32, 0, unit="windows", clock=clock) as progress:
        for _ in range(2):
            progress.task_started(16)
        clock.seconds += 6
        progress.tick()
        progress.task_ended(16)
        progress.advance(0, units=16)
        clock.seconds += 6
        progress.tick()
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "calibrate: 0 of 32 windows, 32 under way, 6 s"
    assert second.startswith("calibrate: 16 of 32 windows, 12 s")


def test_tasks_without_units_do_not_change_the_estimate() -> None:
    """A calibration: minutes for the windows, and many sums that take no time."""
    clock = Clock()
    progress = Progress("calibrate", 40, 0, clock=clock)
    progress.task_started(10)
    clock.seconds += 60
    progress.advance(0, units=10)
    for _ in range(50):
        progress.advance(0, units=0)
    assert progress.seconds_left() == pytest.approx(180)
