import errno
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from normkit.errors import DataError
from normkit.lab.files import usable_folder, whole_file, write_whole
from normkit.lab.records import TrainingRecord, append_record, read_records


def test_records_come_back_as_they_were_written(tmp_path, record):
    written = (record(), record(norm="ln"), record(status="failed", message="a\nb", epochs=()))
    for item in written:
        append_record(tmp_path, item)
    contents = read_records(tmp_path, TrainingRecord)
    assert contents.records == written
    assert contents.corrupt == ()


def test_each_record_is_one_line_of_json(tmp_path, record):
    append_record(tmp_path, record(message="two\nlines"))
    append_record(tmp_path, record())
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["spec"]["norm"] for line in lines] == ["bn", "bn"]


def test_without_a_file_there_are_no_records(tmp_path):
    assert read_records(tmp_path, TrainingRecord).records == ()


CORRUPT = [
    (b'{"spec": ', r"Invalid JSON"),
    (b"{}", r"spec: Field required"),
    (b"[1, 2]", r"should be an object"),
    (b"\x00\xff", r"Invalid JSON"),
    (b"[" * 100_000, r"Invalid JSON"),
    (b'{"duration_s": ' + b"9" * 5000 + b"}", r"Field required|Invalid JSON"),
]


@pytest.mark.parametrize(("text", "reason"), CORRUPT, ids=[reason for _, reason in CORRUPT])
def test_a_corrupt_line_is_told_with_its_number_and_stays_where_it_is(
    tmp_path, record, text, reason
):
    path = tmp_path / "records.jsonl"
    append_record(tmp_path, record(seed=1))
    with path.open("ab") as file:
        file.write(text + b"\n")
    append_record(tmp_path, record(seed=2))
    before = path.read_bytes()
    for _ in range(2):
        contents = read_records(tmp_path, TrainingRecord)
        assert [r.spec.seed for r in contents.records] == [1, 2]
        assert [line.number for line in contents.corrupt] == [2]
        assert re.search(reason, contents.corrupt[0].reason)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["records.jsonl"]


def test_a_line_that_breaks_off_does_not_swallow_the_next_record(tmp_path, record):
    path = tmp_path / "records.jsonl"
    append_record(tmp_path, record(seed=1))
    append_record(tmp_path, record(seed=2))
    path.write_bytes(path.read_bytes()[:-20])  # as a kill in the middle of a write leaves it
    assert [line.reason for line in read_records(tmp_path, TrainingRecord).corrupt] == [
        "it breaks off"
    ]
    append_record(tmp_path, record(seed=3))
    contents = read_records(tmp_path, TrainingRecord)
    assert [r.spec.seed for r in contents.records] == [1, 3]
    assert [line.number for line in contents.corrupt] == [2]


def test_a_full_disk_leaves_no_half_record(tmp_path, record, monkeypatch):
    append_record(tmp_path, record(seed=1))
    before = (tmp_path / "records.jsonl").read_bytes()
    write, calls = os.write, []

    def full(descriptor, data):
        calls.append(0)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:10])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DataError, match="No space left on device"):
        append_record(tmp_path, record(seed=2))
    assert (tmp_path / "records.jsonl").read_bytes() == before


APPENDING = """
import sys
from pathlib import Path
from normkit.lab.lines import append_line
from normkit.lab.spec import Frozen

class Row(Frozen):
    writer: int
    number: int
    text: str

folder, writer = Path(sys.argv[1]), int(sys.argv[2])
for number in range(20):
    append_line(folder / "rows.jsonl", Row(writer=writer, number=number, text="x" * 20_000))
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"broken')
    writers = [
        subprocess.Popen([sys.executable, "-c", APPENDING, str(tmp_path), str(number)])
        for number in range(2)
    ]
    assert [writer.wait(timeout=100) for writer in writers] == [0, 0]
    lines = (tmp_path / "rows.jsonl").read_bytes().split(b"\n")
    assert lines[0] == b'{"broken'
    rows = [json.loads(line) for line in lines[1:-1]]
    assert sorted((row["writer"], row["number"]) for row in rows) == [
        (writer, number) for writer in range(2) for number in range(20)
    ]


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
        read_records(tmp_path, TrainingRecord)
    with pytest.raises(DataError, match=text):
        append_record(tmp_path, record())


def test_a_record_is_on_the_disk_when_it_counts_as_written(tmp_path, record, monkeypatch):
    synced = []

    def note(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        assert read_records(tmp_path, TrainingRecord).records == (record(),)

    monkeypatch.setattr(os, "fsync", note)
    append_record(tmp_path, record())
    assert synced == [tmp_path / "records.jsonl"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = write_whole(tmp_path / "report.html", "old")
    with suppress(KeyboardInterrupt), whole_file(path) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    longest = tmp_path / ("x" * 250 + ".html")
    write_whole(longest, "lone surrogate \udcff")
    assert longest.read_text() == "lone surrogate \\udcff"
    assert {each.name for each in tmp_path.iterdir()} == {path.name, longest.name}
    too_long = pytest.raises(DataError, match=r"name too long\); .* another one with --plot")
    with too_long, whole_file(tmp_path / ("x" * 300), "--plot") as draft:
        draft.write_text("")
    with pytest.raises(DataError, match="Is a directory"):
        write_whole(tmp_path, "text")


def test_a_whole_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = write_whole(tmp_path / "report.html", "old"), []

    def note(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").read_text())
        assert path.read_text() == "old"

    monkeypatch.setattr(os, "fsync", note)
    write_whole(path, "new")
    assert (synced, path.read_text()) == (["new"], "new")


def test_a_file_name_that_is_too_long_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match=r"name too long\).*give another one with --save"):
        usable_folder(tmp_path, "x" * 300, option="--save")
    with pytest.raises(DataError, match=r"output folder .* \(File name too long\)"):
        usable_folder(tmp_path / ("x" * 300))
    with pytest.raises(DataError, match=r"output folder .*a\\x00b cannot be written to"):
        usable_folder(tmp_path / "a\0b")
