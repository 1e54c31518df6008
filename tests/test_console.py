from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Task, TaskID

from inc_clusterq.console import LineProgress, RichProgress, _TimeLeft, progress_on
from inc_clusterq.progress import SILENT


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def shown(on: Console) -> str:
    assert isinstance(on.file, io.StringIO)
    return on.file.getvalue()


def test_the_watcher_suits_the_console() -> None:
    assert isinstance(progress_on(console(terminal=True)), RichProgress)
    assert isinstance(progress_on(console(terminal=False)), LineProgress)
    assert progress_on(console(terminal=True), quiet=True) is SILENT


def test_a_log_gets_two_lines_for_a_short_stage() -> None:
    on = console(terminal=False)
    with progress_on(on).stage("Unit [1]", 1000) as stage:
        for _ in range(1000):
            stage.advance(note="loss 0.1")
    assert shown(on) == "Unit [1]: ...\nUnit [1]: done in 0 s\n"


def test_a_log_gets_a_line_with_time_left_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 40.0, 41.0, 100.0])
    monkeypatch.setattr("inc_clusterq.console.time.monotonic", lambda: next(clock))
    on = console(terminal=False)
    with progress_on(on).stage("Unit", 8) as stage:
        stage.advance(2)
        stage.advance(2, "loss 0.1")
        stage.advance()
    assert shown(on).splitlines() == ["Unit: ...", "Unit: 4/8, about 40 s left, loss 0.1", "Unit: done in 100 s"]


def test_steps_that_took_no_time_do_not_count_for_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 40.0, 50.0])
    monkeypatch.setattr("inc_clusterq.console.time.monotonic", lambda: next(clock))
    on = console(terminal=False)
    with progress_on(on).stage("Unit", 10) as stage:
        stage.skip(6, "resumed")
        stage.advance(2)
    assert shown(on).splitlines()[1] == "Unit: 8/10, about 40 s left"


def test_a_bar_counts_them_as_little(monkeypatch: pytest.MonkeyPatch) -> None:
    on, clock = console(terminal=True), [0.0]
    watcher = RichProgress(on)
    monkeypatch.setattr(watcher._bars, "get_time", lambda: clock[0])
    with watcher.stage("Unit", 10) as stage:
        stage.skip(6, "resumed")
        clock[0] = 80.0
        stage.advance(2)
    last = shown(on).rsplit("8/10", 1)[1]
    assert "01:20" in last  # at 40 seconds for each of the two


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (59.6, "01:00"), (3599, "59:59"), (36_061, "10:01:01")])
def test_the_time_left_is_read_at_a_glance(seconds: float, text: str) -> None:
    task = Task(TaskID(0), "", 2, 1, _get_time=lambda: seconds, fields={"skipped": 0})
    task.start_time = 0.0
    assert str(_TimeLeft().render(task)) == text
    task.completed = 0
    assert str(_TimeLeft().render(task)) == "--:--"


def test_a_stage_that_fails_is_not_called_done() -> None:
    on = console(terminal=False)
    with pytest.raises(KeyboardInterrupt), progress_on(on).stage("Unit", 8):
        raise KeyboardInterrupt
    assert "done" not in shown(on)


def test_a_terminal_gets_nested_bars_with_counts_and_notes() -> None:
    on = console(terminal=True)
    progress = progress_on(on)
    with progress.stage("Trials", 2) as outer:
        with progress.stage("Unit [a]", 3) as inner:
            inner.advance(3, "loss [0.1]")
        outer.advance()
    text = shown(on)
    assert "Trials" in text
    assert "1/2" in text
    assert "Unit [a]" in text
    assert "3/3" in text
    assert "loss [0.1]" in text


def test_a_second_job_on_the_same_terminal_does_not_draw_the_first_one_again() -> None:
    on = console(terminal=True)
    progress = progress_on(on)
    with progress.stage("First", 1):
        pass
    before = len(shown(on))
    with progress.stage("Second", 1):
        pass
    assert "First" not in shown(on)[before:]


def test_silence_takes_steps_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with SILENT.stage("Unit", 3) as stage:
        stage.advance(2, "loss")
    assert capsys.readouterr() == ("", "")
