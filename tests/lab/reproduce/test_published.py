"""What docs/reproduce.md says is what the runs in its records come to."""

import importlib.util
from pathlib import Path

import pytest

from normkit.errors import DataError
from normkit.lab.reproduce import PRESETS, as_text, conclude, read_result
from normkit.lab.reproduce.papers import PAPERS
from normkit.lab.reproduce.tables.catalog import tables
from normkit.lab.reproduce.tables.result import judged, read_table_result

DOCS = Path(__file__).parents[3] / "docs"
PATHS = [DOCS / "records" / f"reproduce-{name}.json" for name in PRESETS]


def program(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("key", PAPERS)
def test_the_page_of_a_paper_has_all_its_tables(key):
    update = program("update_tables")
    page = (DOCS / "tables" / f"{key}.md").read_text(encoding="utf-8")
    assert update.page(key) == page
    for table in tables().values():
        assert (f"\n### {table.name}\n" in page) == (table.of == key)


def test_the_list_of_tables_is_that_of_the_presets():
    update = program("update_tables")
    text = (DOCS / "reproduce.md").read_text(encoding="utf-8")
    assert update.updated(text) == text
    assert update.overview() in text


def test_a_result_of_other_settings_is_refused(monkeypatch, tmp_path):
    update = program("update_tables")
    table = tables()["H-T3"]
    other = table.model_copy(update={"small": {**table.small, "epochs": 7}})
    with pytest.raises(DataError, match="is of other settings than preset H-T3 has at scale"):
        update.result_of(other)


def test_verdicts_on_tables_are_those_of_their_runs():
    for table in tables().values():
        path = DOCS / "records" / f"reproduce-{table.name}.json"
        if path.exists():
            result = read_table_result(path)
            assert result.scale == "small"
            assert result.differences == table.differences("small")
            assert {n: table.readings[n] for n in result.readings} == result.readings
            assert result.numbers == table.numbers
            assert judged(table, "small", result.cells) == result.claims
            assert (DOCS / "images" / f"reproduce-{table.name}.svg").exists()


def test_the_page_has_the_tables_of_its_records():
    update = program("update_reproduce")
    page = (DOCS / "reproduce.md").read_text(encoding="utf-8")
    assert update.updated(page) == page
    for name in PRESETS:
        assert f"\n### {name}\n" in page


@pytest.mark.parametrize("path", PATHS, ids=list(PRESETS))
def test_verdicts_are_those_of_the_runs(path):
    result = read_result(path)
    preset = PRESETS[result.preset]
    assert result.scale == "small"
    assert [record.spec for record in result.runs] == list(preset.specs("small"))
    assert conclude(preset, "small", result.runs) == result
    assert all(judged.verdict.num_seeds >= 3 for judged in result.claims)
    assert (DOCS / "images" / f"reproduce-{preset.name}.svg").exists()


def test_the_readme_shows_the_end_of_a_result():
    result = read_result(DOCS / "records" / "reproduce-gnbn-small-training-sets.json")
    end = as_text(result).splitlines()[-2:]
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert "".join(f"    {line}\n" for line in end) in readme
