"""Records of runs, and going on where a run stopped."""

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
from normkit.lab.reproduce import run as running
from normkit.lab.reproduce.records import PresetRecord


@pytest.fixture
def preset():
    """Six runs of a few hundredths of a second."""
    return find_preset("gnbn")


def test_finished_runs_are_not_repeated_and_presets_share_them(preset, tmp_path):
    told = []
    shared = run_missing(find_preset("estimation-shift"), "tiny", tmp_path)
    records = run_missing(preset, "tiny", tmp_path, lambda *what: told.append(what))
    assert [record.spec.arm for record in records] == ["bn", "gnbn"] * 3
    assert records[::2] == shared
    assert [(record.spec.arm, done, total) for record, done, total in told] == [
        ("gnbn", 1, 3),
        ("gnbn", 2, 3),
        ("gnbn", 3, 3),
    ]
    assert run_missing(preset, "tiny", tmp_path, lambda *_: pytest.fail("ran again")) == records


def test_an_interrupted_preset_goes_on_where_it_stopped(preset, tmp_path, monkeypatch):
    def interrupted(_record, done, _total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_missing(preset, "tiny", tmp_path, interrupted)
    path = tmp_path / RECORDS_NAME
    kept = path.read_bytes()
    assert len(read_records(tmp_path, PresetRecord).records) == 2
    path.write_bytes(kept[:-40])  # the second line breaks off
    ran = []
    whole = running.run_one
    monkeypatch.setattr(running, "run_one", lambda *given: ran.append(given[2]) or whole(*given))
    records = run_missing(preset, "tiny", tmp_path)
    assert len(records) == 6
    assert len(ran) == 5
    assert len(read_records(tmp_path, PresetRecord).records) == 6


def test_runs_on_other_data_are_done_anew(preset, tmp_path, monkeypatch):
    first = run_missing(preset, "tiny", tmp_path)
    assert len({record.data_hash for record in first}) == 1
    data = type(preset.at("tiny").settings)
    monkeypatch.setattr(data, "fingerprint", lambda _settings: "0" * 12)
    told = []
    records = run_missing(preset, "tiny", tmp_path, lambda *what: told.append(what))
    assert len(told) == len(records) == 6
    assert {record.data_hash for record in records} == {"0" * 12}
    monkeypatch.undo()
    assert run_missing(preset, "tiny", tmp_path, lambda *_: pytest.fail("ran again")) == first


def test_equal_specs_give_equal_values(preset, tmp_path):
    spec = preset.specs("tiny")[0]
    first, again = (running.run_one(preset, "tiny", spec) for _ in range(2))
    assert first.values == again.values
    assert first.spec.key == again.spec.key != preset.specs("tiny")[1].key
    assert len(first.code_hash) == 12


def test_a_result_is_read_back_as_it_was_written(preset, tmp_path):
    result = conclude(preset, "tiny", run_missing(preset, "tiny", tmp_path))
    path = write_result(tmp_path, result)
    assert path.name == "reproduce-gnbn.json"
    assert read_result(path) == result
    assert isinstance(result, Result)
    assert "data digits (paper: MNIST)" in result.differences


def test_a_file_that_holds_no_result_is_refused(tmp_path):
    path = tmp_path / "reproduce-gnbn.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"gnbn.json holds no result of a preset \(preset: Field"):
        read_result(path)


def test_unknown_presets_and_scales_are_refused_with_what_is_known():
    with pytest.raises(SpecError, match=r"no preset 'gnnb'; known are estimation-shift, .*, all$"):
        find_preset("gnnb")
    with pytest.raises(SpecError, match="'statdiff' has no scale 'paper'; it has tiny, small"):
        find_preset("statdiff").at("paper")
