"""A file is there whole, or as it was."""

import os

import pytest

from hasten.atomic import write_bytes_atomically, write_text_atomically


def test_writes_and_replaces(tmp_path):
    file = tmp_path / "report.json"
    write_text_atomically(file, "Fréchet")
    assert file.read_text(encoding="utf-8") == "Fréchet"
    write_bytes_atomically(file, b"\x00\r\n")
    assert file.read_bytes() == b"\x00\r\n"
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, step):
    file = tmp_path / "report.json"
    write_text_atomically(file, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(f"hasten.atomic.os.{step}", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomically(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_the_new_file_is_on_the_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr("hasten.atomic.os.fsync", lambda f: (done.append("sync"), sync(f)))
    monkeypatch.setattr("hasten.atomic.os.replace", lambda a, b: (done.append("replace"), replace(a, b)))
    write_text_atomically(tmp_path / "a", "text")
    assert done[:2] == ["sync", "replace"]


def test_permissions(tmp_path):
    file = tmp_path / "a"
    plain = tmp_path / "plain"
    plain.touch()
    write_text_atomically(file, "1")
    assert file.stat().st_mode == plain.stat().st_mode  # as an ordinary new file, not private to the writer
    file.chmod(0o640)
    write_text_atomically(file, "2")
    assert file.stat().st_mode & 0o777 == 0o640


def test_an_absent_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text_atomically(tmp_path / "absent" / "a", "text")
