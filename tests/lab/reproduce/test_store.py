"""Records of runs, and going on where a run stopped."""

from dataclasses import replace

import pytest

from normkit.errors import DataError, SpecError
from normkit.lab.records import RECORDS_NAME, read_records
from normkit.lab.reproduce import (
    Result,
    conclude,
    find_preset,
    read_result,
    run_missing,
    write_result,
)
from normkit.lab.reproduce.tasks import run as running
from normkit.lab.reproduce.tasks.records import PresetRecord
from normkit.lab.work import Upkeep, Way


@pytest.fixture
def preset():
    """Six runs of a few hundredths of a second."""
    return find_preset("gnbn")


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self):
        self.missing, self.records = [], []

    def __call__(self, specs):
        """Take the runs that are missing."""
        self.missing.append(len(specs))
        return self

    def on_steps(self, spec, num_steps):
        """Nothing."""

    def on_record(self, record):
        """Keep it."""
        self.records.append(record)


def test_finished_runs_are_not_repeated_and_presets_share_them(preset, tmp_path):
    notes = Notes()
    shared = run_missing(find_preset("estimation-shift"), "tiny", tmp_path)
    records = run_missing(preset, "tiny", tmp_path, notes)
    assert [record.spec.arm for record in records] == ["bn", "gnbn"] * 3
    assert records[::2] == shared
    assert [record.spec.arm for record in notes.records] == ["gnbn"] * 3
    assert run_missing(preset, "tiny", tmp_path, notes) == records
    assert notes.missing == [3, 0]


def test_an_interrupted_preset_goes_on_where_it_stopped(preset, tmp_path):
    class Interrupting(Notes):
        def on_record(self, record):
            super().on_record(record)
            if len(self.records) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_missing(preset, "tiny", tmp_path, Interrupting())
    path = tmp_path / RECORDS_NAME
    kept = path.read_bytes()
    assert len(read_records(tmp_path, PresetRecord).records) == 2
    path.write_bytes(kept[:-40])  # the second line breaks off
    records = run_missing(preset, "tiny", tmp_path, notes := Notes())
    assert len(records) == 6
    assert notes.missing == [5]
    assert len(read_records(tmp_path, PresetRecord).records) == 6


def test_workers_give_the_values_that_this_process_gives(preset, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    way = Way(out=there, num_workers=2, upkeep=Upkeep(folder=there))
    one = run_missing(preset, "tiny", here)
    other = run_missing(preset, "tiny", there, way=way)
    assert [record.values for record in one] == [record.values for record in other]


def test_runs_on_other_data_or_by_other_code_are_done_anew(preset, tmp_path, monkeypatch):
    first = run_missing(preset, "tiny", tmp_path)
    assert len({(record.data_hash, record.code_hash) for record in first}) == 1
    data = type(preset.at("tiny").settings)
    monkeypatch.setattr(data, "fingerprint", lambda _settings: "0" * 12)
    records = run_missing(preset, "tiny", tmp_path, notes := Notes())
    assert len(notes.records) == len(records) == 6
    assert {record.data_hash for record in records} == {"0" * 12}
    monkeypatch.undo()
    notes = Notes()
    assert run_missing(preset, "tiny", tmp_path, notes) == first
    monkeypatch.setattr(running, "code_hash", lambda *_: "1" * 12)
    records = run_missing(preset, "tiny", tmp_path, notes)
    assert notes.missing == [0, 6]
    assert {record.code_hash for record in records} == {"1" * 12}


def test_a_run_that_fails_is_recorded_and_tried_again(preset, tmp_path, monkeypatch):
    task = running.TASKS["stack"]

    def broken(settings, arm, seed, place):
        if (arm, seed) == ("gnbn", 2):
            raise ZeroDivisionError("by zero")
        return task.measure(settings, arm, seed, place)

    monkeypatch.setitem(running.TASKS, "stack", replace(task, measure=broken))
    with pytest.raises(DataError, match=r"1 runs failed, .* \(gnbn, seed 2\) with: ZeroDivis"):
        run_missing(preset, "tiny", tmp_path)
    monkeypatch.undo()
    records = run_missing(preset, "tiny", tmp_path, notes := Notes())
    assert notes.missing == [1]
    assert all(record.values for record in records)


def test_equal_specs_give_equal_values(preset):
    specs = preset.specs("tiny")
    first, again = (running.run_one(specs[0]) for _ in range(2))
    assert first.values == again.values
    assert first.spec.key == again.spec.key != specs[1].key
    assert len(first.code_hash) == 12


def test_a_result_is_read_back_as_it_was_written(preset, tmp_path):
    result = conclude(preset, "tiny", run_missing(preset, "tiny", tmp_path))
    path = write_result(tmp_path, result)
    assert path.name == "reproduce-gnbn.json"
    assert read_result(path) == result
    assert isinstance(result, Result)
    assert "data digits (paper: mnist)" in result.differences


def test_a_file_that_holds_no_result_is_refused(tmp_path):
    path = tmp_path / "reproduce-gnbn.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"gnbn.json holds no result of a preset \(preset: Field"):
        read_result(path)


def test_unknown_presets_are_refused_with_what_is_known():
    with pytest.raises(SpecError, match=r"no preset 'gnnb'; known are estimation-shift, .*, all$"):
        find_preset("gnnb")
    assert find_preset("h-f4") is find_preset("GNBN") is find_preset("gnbn")
