import json
import os
from pathlib import Path

import pytest

from normkit.errors import DataError
from normkit.lab.records import append_record, read_records, usable_folder


def test_records_come_back_as_they_were_written(tmp_path, record):
    written = (record(), record(norm="ln"), record(status="failed", message="a\nb", epochs=()))
    for item in written:
        append_record(tmp_path, item)
    contents = read_records(tmp_path)
    assert contents.records == written
    assert contents.corrupt == ()


def test_each_record_is_one_line_of_json(tmp_path, record):
    append_record(tmp_path, record(message="two\nlines"))
    append_record(tmp_path, record())
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["spec"]["norm"] for line in lines] == ["bn", "bn"]


def test_without_a_file_there_are_no_records(tmp_path):
    assert read_records(tmp_path).records == ()


CORRUPT = [
    ('{"spec": ', r"Invalid JSON"),
    ("{}", r"spec: Field required"),
    ("[1, 2]", r"should be an object"),
    ("\x00\xff", r"Invalid JSON"),
]


@pytest.mark.parametrize(("text", "reason"), CORRUPT, ids=str)
def test_a_corrupt_line_is_set_aside_with_its_number_and_the_rest_is_used(
    tmp_path, record, text, reason
):
    append_record(tmp_path, record(seed=1))
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write(text + "\n")
    append_record(tmp_path, record(seed=2))
    contents = read_records(tmp_path)
    assert [r.spec.seed for r in contents.records] == [1, 2]
    assert [line.number for line in contents.corrupt] == [2]
    assert reason in contents.corrupt[0].reason
    assert (tmp_path / "records.corrupt.jsonl").read_text() == text + "\n"
    again = read_records(tmp_path)
    assert again.records == contents.records
    assert again.corrupt == ()


def test_a_line_that_breaks_off_does_not_swallow_the_next_record(tmp_path, record):
    path = tmp_path / "records.jsonl"
    append_record(tmp_path, record(seed=1))
    append_record(tmp_path, record(seed=2))
    path.write_bytes(path.read_bytes()[:-20])  # as a kill in the middle of a write leaves it
    assert [line.reason for line in read_records(tmp_path).corrupt] == ["it breaks off"]
    append_record(tmp_path, record(seed=3))
    assert [r.spec.seed for r in read_records(tmp_path).records] == [1, 3]


def test_a_folder_is_made_with_its_parents(tmp_path):
    assert usable_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/out cannot be written to \(.*\); give another one "):
        usable_folder(tmp_path / "file" / "out")


def test_a_folder_without_permission_is_refused():
    with pytest.raises(DataError, match=r"output folder /proc/normkit cannot be written to"):
        usable_folder(Path("/proc/normkit"))


def test_a_records_file_that_cannot_be_read_or_written_is_named(tmp_path, record):
    (tmp_path / "records.jsonl").mkdir()
    text = r"records.jsonl cannot be read or written \(Is a directory\); make room and permission"
    with pytest.raises(DataError, match=text):
        read_records(tmp_path)
    with pytest.raises(DataError, match=text):
        append_record(tmp_path, record())


def test_a_record_is_on_the_disk_when_it_counts_as_written(tmp_path, record, monkeypatch):
    synced = []

    def note(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        assert read_records(tmp_path).records == (record(),)

    monkeypatch.setattr(os, "fsync", note)
    append_record(tmp_path, record())
    assert synced == [tmp_path / "records.jsonl"]
