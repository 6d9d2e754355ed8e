"""What is written is there whole or not at all: files and folders, whatever ends the writing."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from support.errors import UserError
from support.files import whole, write_whole


def write_folder(path: Path, text: str) -> None:
    with whole(path) as partial:
        (partial / "below").mkdir(parents=True)
        (partial / "below" / "file").write_text(text)


WRITERS = {"file": write_whole, "folder": write_folder}


def content(path: Path) -> str:
    return (path / "below" / "file" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("kind", WRITERS)
def test_the_old_is_there_until_the_new_is_on_disk(tmp_path, monkeypatch, kind):
    """At every flush the old stands whole; the last is that of the folder which holds both, with the new in place."""
    path, seen, fsync = tmp_path / "it", [], os.fsync
    WRITERS[kind](path, "old")

    def looking(descriptor):
        seen.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), content(path)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", looking)
    WRITERS[kind](path, "new")
    inside = [(False, "old")] if kind == "file" else [(True, "old"), (False, "old"), (True, "old")]
    assert seen == [*inside, (True, "new")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("a bug")])
def test_what_ends_the_writing_leaves_the_old_alone(tmp_path, kind, error):
    path = tmp_path / "it"
    WRITERS[kind](path, "old")
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)), whole(path) as partial:
        WRITERS[kind](partial, "new")
        raise error
    assert content(path) == "old" and [entry.name for entry in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("ended", ["by an error", "by a kill"])
def test_a_folder_whose_successor_does_not_come_stands_again(tmp_path, monkeypatch, ended):
    """Between the two renames the old has another name and the new has not yet its own."""
    path, replace = tmp_path / "it", Path.replace
    write_folder(path, "old")

    def failing(self, target):
        if ended == "by an error":
            raise OSError(5, "Input/output error")
        shutil.copytree(tmp_path, tmp_path.with_name("killed"))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    if ended == "by an error":
        with pytest.raises(UserError, match="it cannot be written: Input/output error"):
            write_folder(path, "new")
    else:
        write_folder(path, "new")
        path = tmp_path.with_name("killed") / "it"
        with pytest.raises(KeyboardInterrupt), whole(path):
            raise KeyboardInterrupt
    assert content(path) == "old" and [entry.name for entry in path.parent.iterdir()] == ["it"]


@pytest.mark.parametrize("kind", WRITERS)
def test_what_a_kill_has_left_is_in_nobodys_way(tmp_path, kind):
    WRITERS[kind](tmp_path / "it", "old")
    for name in (".partial-it", ".partial-old-it"):
        (tmp_path / name / "below" / "file").mkdir(parents=True)
    WRITERS[kind](tmp_path / "it", "new")
    assert content(tmp_path / "it") == "new" and [entry.name for entry in tmp_path.iterdir()] == ["it"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "it", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink() and target.read_text() == "new"


def test_what_is_no_file_is_written_where_it_stands(tmp_path):
    """As /dev/stdout or /dev/null, which no file may replace."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "text")
    assert os.read(reader, 99) == b"text" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


def test_a_folder_does_not_take_the_place_of_a_file(tmp_path):
    (tmp_path / "it").write_text("mine")
    with pytest.raises(UserError, match="it cannot be written: "):
        write_folder(tmp_path / "it", "new")
    assert content(tmp_path / "it") == "mine"


def test_nothing_is_written_where_the_folder_is_gone(tmp_path):
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        write_whole(tmp_path / "gone" / "it", "new")
    assert list(tmp_path.iterdir()) == []
