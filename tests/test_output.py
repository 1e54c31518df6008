from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from inc_clusterq.errors import OutputError
from inc_clusterq.output import RESULT, check_output, filled_whole, replace_file


def fill(folder: Path, text: str = "{}") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_or_an_empty_folder_is_fine(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=overwrite)
    check_output(tmp_path / "new", overwrite=overwrite)
    check_output(tmp_path / "deep" / "er" / "new", overwrite=overwrite)
    assert contents(tmp_path) == {}
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file; name a folder"):
        check_output(tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path) == {"out": "mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="holds other files and no earlier result"):
        check_output(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"thesis.tex": "mine"}


def test_an_earlier_result_is_replaced_only_when_asked(tmp_path: Path) -> None:
    fill(tmp_path / "out")
    with pytest.raises(OutputError, match="already holds a result; add --overwrite"):
        check_output(tmp_path / "out", overwrite=False)
    check_output(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("inside", ["", "ws", "deep/er"])
def test_a_workspace_inside_is_refused(tmp_path: Path, inside: str) -> None:
    with pytest.raises(OutputError, match=r"the workspace .* lies in it; name another for one of them"):
        check_output(tmp_path / "out", overwrite=True, workspace=tmp_path / "out" / inside)
    check_output(tmp_path / "out", overwrite=True, workspace=tmp_path / "outside")
    check_output(tmp_path / "ws" / "out", overwrite=True, workspace=tmp_path / "ws")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place such as /proc, which takes no file")
def test_a_place_that_takes_no_file_is_told_from_one_that_is_in_use() -> None:
    with pytest.raises(OutputError, match="cannot be written: no file can be made in /proc"):
        check_output(Path("/proc/inc-clusterq"), overwrite=False)


# Permissions would not stop a test that runs as root; a path below a file stops everybody.
@pytest.mark.parametrize("name", ["file/out", "file/deep/out"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(tmp_path / name, overwrite=False)
    with pytest.raises(OutputError, match="cannot be written"), filled_whole(tmp_path / name, overwrite=False):
        pytest.fail("the block must not be entered")


def test_the_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with filled_whole(out, overwrite=True) as folder:
        fill(folder)
        assert not out.exists()
        assert folder.parent == tmp_path
    assert contents(tmp_path) == {f"out/{RESULT}": "{}"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt()])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: BaseException) -> None:
    def work() -> None:
        with filled_whole(tmp_path / "out", overwrite=True) as folder:
            fill(folder)
            raise error

    with pytest.raises(type(error)):
        work()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_job_leaves_the_earlier_result_as_it_was(tmp_path: Path) -> None:
    def work() -> None:
        with filled_whole(tmp_path / "out", overwrite=True) as folder:
            fill(folder, "new")
            raise ValueError

    fill(tmp_path / "out", "old")
    with pytest.raises(ValueError, match=r"^$"):
        work()
    assert contents(tmp_path) == {f"out/{RESULT}": "old"}


def test_a_new_result_takes_the_place_of_the_whole_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    (out / "leftover").write_text("old")
    with filled_whole(out, overwrite=True) as folder:
        fill(folder, "new")
        assert contents(out) == {RESULT: "old", "leftover": "old"}
    assert contents(tmp_path) == {f"out/{RESULT}": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(5, "Input/output error"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_an_old_result_comes_back_when_the_new_one_cannot_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException]
) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == out and "old" not in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(raised) as found, filled_whole(out, overwrite=True) as folder:
        fill(folder, "new")
    assert raised is KeyboardInterrupt or "cannot be written: Input/output error" in str(found.value)
    assert contents(tmp_path) == {f"out/{RESULT}": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_job_does_not_write_where_one_is_writing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with filled_whole(out, overwrite=True) as folder:
        fill(folder)
        with pytest.raises(OutputError, match="being written by another job"):
            check_output(out, overwrite=True)
    assert contents(tmp_path) == {f"out/{RESULT}": "{}"}


KILLED = """
import os, signal, sys
from pathlib import Path
from inc_clusterq.output import RESULT, filled_whole

step, rename, renamed = int(sys.argv[2]), Path.rename, 0

def kill_behind(self, target):
    global renamed
    rename(self, target)
    renamed += 1
    if renamed == step:
        os.kill(os.getpid(), signal.SIGKILL)

Path.rename = kill_behind
with filled_whole(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / RESULT).write_text("new")
    if step == 0:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("step", "found"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_kill_at_any_time_loses_no_result_and_the_next_job_clears_what_is_left(tmp_path: Path, step: int, found: str) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), str(step)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] != ["out"]
    with pytest.raises(OutputError, match="already holds a result"):
        check_output(out, overwrite=False)
    assert contents(tmp_path) == {f"out/{RESULT}": found}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_result_that_arrives_during_the_job_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def work() -> None:
        with filled_whole(out, overwrite=False) as folder:
            fill(folder, "ours")
            fill(out, "theirs")

    with pytest.raises(OutputError, match="already holds a result"):
        work()
    assert contents(tmp_path) == {f"out/{RESULT}": "theirs"}


def test_files_that_arrive_during_the_job_are_not_deleted(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def work() -> None:
        with filled_whole(out, overwrite=True) as folder:
            fill(folder)
            out.mkdir()
            (out / "thesis.tex").write_text("mine")

    with pytest.raises(OutputError, match="holds other files"):
        work()
    assert contents(tmp_path) == {"out/thesis.tex": "mine"}


def test_the_current_folder_and_those_above_it_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    for folder in (Path(), Path(".."), tmp_path):
        with pytest.raises(OutputError, match="current folder"):
            check_output(folder, overwrite=True)


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name in ("empty", "new"):
        link = tmp_path / f"link_to_{name}"
        link.symlink_to(tmp_path / "disk" / name)
        check_output(link, overwrite=False)
        with filled_whole(link, overwrite=True) as folder:
            fill(folder, name)
        assert link.is_symlink()
    assert contents(tmp_path / "disk") == {f"{name}/{RESULT}": name for name in ("empty", "new")}


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "out")
    with pytest.raises(OutputError, match=r"is a mount point .* name a folder inside it"):
        check_output(tmp_path / "out", overwrite=False)
    check_output(tmp_path / "out" / "inside", overwrite=False)


def test_only_errors_of_its_own_files_are_blamed_on_the_output(tmp_path: Path) -> None:
    def open_in(folder: Path) -> None:
        (folder / "deep" / "file").read_text()

    with pytest.raises(FileNotFoundError), filled_whole(tmp_path / "out", overwrite=True):
        open_in(tmp_path)
    with (
        pytest.raises(OutputError, match="out cannot be written: No such file"),
        filled_whole(tmp_path / "out", overwrite=True) as folder,
    ):
        open_in(folder)
    with pytest.raises(OutputError, match="No space left"), filled_whole(tmp_path / "out", overwrite=True):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OutputError, match="No space left"), filled_whole(tmp_path / "out", overwrite=True) as folder:
        raise OSError(errno.ENOSPC, "No space left on device", "where it comes from", None, str(folder / "where it goes"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_in_one_step_and_stays_where_that_fails(tmp_path: Path) -> None:
    file = tmp_path / "file"
    replace_file(file, b"first")
    file.chmod(0o400)  # which a rename does not ask for
    replace_file(file, b"second")
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask()
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        replace_file(tmp_path / "folder", b"third")
    assert contents(tmp_path) == {"file": "second"}


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
