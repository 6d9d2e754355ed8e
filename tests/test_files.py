"""Files are written completely or not at all, and errors name the path."""

import os
import resource
import stat

import pytest
import torch
from safetensors.torch import save_file

from support.common.errors import UserError
from support.common.files import damaged, disk_errors, read_json, whole, whole_lines, write_whole


def write_folder(path, text):
    with whole(path) as partial:
        (partial / "below").mkdir(parents=True)
        (partial / "below" / "file").write_text(text)


WRITERS = {"file": write_whole, "folder": write_folder}


def content(path):
    return (path / "below" / "file" if path.is_dir() else path).read_text()


@pytest.fixture
def file_limit():
    """A function that limits the size of written files, to simulate a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", WRITERS)
def test_the_old_content_stays_until_the_new_content_is_on_disk(tmp_path, monkeypatch, kind):
    """Every file and folder is flushed before the new content replaces the old, and the parent folder is flushed after
    that. Leftovers of a killed process are removed."""
    path, seen, fsync = tmp_path / "it", [], os.fsync
    WRITERS[kind](path, "old")
    (tmp_path / ".partial-it" / "below" / "leftover").mkdir(parents=True)

    def looking(descriptor):
        seen.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), content(path)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", looking)
    WRITERS[kind](path, "new")
    inside = [(False, "old")] if kind == "file" else [(True, "old"), (False, "old"), (True, "old")]
    assert seen == [*inside, (True, "new")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_only_the_old_content(tmp_path, kind, error):
    path = tmp_path / "it"
    WRITERS[kind](path, "old")
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)), whole(path) as partial:
        WRITERS[kind](partial, "new")
        raise error
    assert content(path) == "old" and [entry.name for entry in tmp_path.iterdir()] == ["it"]


BIG = torch.zeros(1 << 20)


@pytest.mark.parametrize(
    "write", [write_whole, lambda path, _: torch.save(BIG, path), lambda path, _: save_file({"a": BIG}, path)]
)
def test_a_full_disk_gives_a_one_line_error_with_the_path_and_the_free_space(tmp_path, file_limit, write):
    """Python, torch and safetensors report a full disk differently."""
    file_limit(1 << 16)
    with pytest.raises(UserError) as error, disk_errors(tmp_path / "it"):
        write(tmp_path / "it", "x" * (1 << 17))
    said = str(error.value)
    assert str(tmp_path / "it") in said and "MiB free" in said and "\n" not in said
    with pytest.raises(RuntimeError, match="a bug"), disk_errors(tmp_path):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("text", [b"[]", b"{}", "感".encode("gbk")])
def test_a_damaged_json_file_gives_a_one_line_error_with_the_path_and_the_remedy(tmp_path, text):
    """The file isn't an object, lacks a key or isn't UTF-8. If there is no file, the caller decides what happens."""
    path = tmp_path / "it.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=f"^{path} is damaged.*; remove it$"), damaged(path, "remove it"):
        read_json(path, "remove it")["a"]
    assert read_json(tmp_path / "none", "", missing={}) == {}
    with pytest.raises(UserError, match="none cannot be read"):
        read_json(tmp_path / "none", "")


def test_an_incomplete_last_line_of_a_log_is_ignored(tmp_path):
    """The line may end inside a character. Only a line feed ends a line, unlike in `str.splitlines`."""
    (tmp_path / "log").write_bytes("\ufeff一\u2028二\n三\r\n四".encode()[:-1])
    assert whole_lines(tmp_path / "log") == ["一\u2028二", "三\r"]
