"""Replacing files and folders whole, and telling the leftovers of the dead from the living's."""

import os
import subprocess
import sys

import pytest

from fastlm.files import SUFFIX, remove_leftovers, replacing, replacing_folder, write_text


@pytest.fixture
def events(monkeypatch):
    """What is synced and renamed, in order: ("sync", inode) and ("rename", name)."""
    seen = []
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def renamed(source, target, original=original):
            original(source, target)
            seen.append(("rename", os.path.basename(target)))

        monkeypatch.setattr(os, name, renamed)
    fsync = os.fsync

    def synced(handle):
        fsync(handle)
        seen.append(("sync", os.fstat(handle).st_ino))

    monkeypatch.setattr(os, "fsync", synced)
    return seen


def test_a_file_is_synced_before_its_rename_and_its_folder_after(tmp_path, events):
    write_text(tmp_path / "a.txt", "text")
    inodes = [path.stat().st_ino for path in (tmp_path / "a.txt", tmp_path)]
    assert events == [("sync", inodes[0]), ("rename", "a.txt"), ("sync", inodes[1])]


def test_a_folder_is_synced_before_its_rename_and_its_parent_after(tmp_path, events):
    with replacing_folder(tmp_path / "made") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("text")
    inner = {p.stat().st_ino for p in (tmp_path / "made", *(tmp_path / "made").rglob("*"))}
    place = events.index(("rename", "made"))
    assert {inode for kind, inode in events[:place] if kind == "sync"} == inner
    assert events[place + 1 :] == [("sync", tmp_path.stat().st_ino)]


def test_a_folder_takes_the_place_of_a_full_one_or_leaves_it(tmp_path):
    for text in ("old", "new"):
        with replacing_folder(tmp_path / "a") as folder:
            (folder / "text").write_text(text)
    assert (tmp_path / "a" / "text").read_text() == "new"
    with replacing_folder(tmp_path / "a", keep_existing=True) as folder:
        (folder / "text").write_text("late")
    assert (tmp_path / "a" / "text").read_text() == "new"
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "a") as folder:
        (folder / "text").write_text("half")
        raise RuntimeError
    assert (tmp_path / "a" / "text").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    rename = os.rename

    def failing(source, target):
        if target == tmp_path / "a" and (source / "text").read_text() == "new":
            raise OSError(28, "No space left on device")
        rename(source, target)

    with replacing_folder(tmp_path / "a") as folder:
        (folder / "text").write_text("old")
    monkeypatch.setattr(os, "rename", failing)
    with (
        pytest.raises(OSError, match=r"/a: could not be written .*No space"),
        replacing_folder(tmp_path / "a") as folder,
    ):
        (folder / "text").write_text("new")
    assert (tmp_path / "a" / "text").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


KILLED = """
import os, signal, sys
from fastlm.files import replacing, replacing_folder
with replacing(sys.argv[1] + "/a.txt"), replacing_folder(sys.argv[1] + "/b") as folder:
    (folder / "text").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_leftovers_of_the_dead_are_removed_and_the_livings_are_not(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command).returncode == -9
    assert len(list(tmp_path.glob(f".*{SUFFIX}"))) == 2
    (tmp_path / ".mine").write_text("a hidden file of the user")
    with replacing(tmp_path / "c.txt") as file, replacing_folder(tmp_path / "d") as folder:
        remove_leftovers(tmp_path)
        assert set(tmp_path.iterdir()) == {file.parent, folder, tmp_path / ".mine"}
        file.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "c.txt", "d"]


def test_a_temporary_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """`remove_leftovers` of another process may come before the lock of a fresh temporary."""
    from fastlm import files

    lock, tries = files.lock, []

    def late(handle):
        tries.append(handle)
        if len(tries) == 1:
            (taken,) = tmp_path.glob(f".*{SUFFIX}")
            taken.rmdir()
        return lock(handle)

    monkeypatch.setattr(files, "lock", late)
    write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text" and len(tries) == 2
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_may_be_replaced_while_it_is_written(tmp_path):
    """safetensors and matplotlib rename a temporary file of their own to the name they get."""
    with replacing(tmp_path / "a.txt") as path:
        path.write_text("locked?")
        (path.parent / "other").write_text("text")
        (path.parent / "other").rename(path)
        remove_leftovers(tmp_path)
    assert (tmp_path / "a.txt").read_text() == "text"


def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_text("text")
    with replacing(tmp_path / "a.txt") as path:
        path.write_text("text")
        path.chmod(0o600)
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way of a folder")
    with pytest.raises(OSError, match=r"file/a\.txt: could not be written"):
        write_text(tmp_path / "file" / "a.txt", "text")
