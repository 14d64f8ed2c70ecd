"""What a release says of itself in several places agrees."""

import datetime
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import normkit as nk

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
HEADINGS = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def released():
    """Versions and days of the changelog, the newest first."""
    found = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) - (\d{4}-\d\d-\d\d)", each) for each in HEADINGS]
    assert all(found), HEADINGS
    return [(tuple(int(n) for n in m.groups()[:3]), m[4]) for m in found]


def test_the_changelog_begins_with_this_version_and_goes_back():
    if HEADINGS[0] == "Unreleased":
        del HEADINGS[0]
    versions = [version for version, _ in released()]
    assert versions == sorted(set(versions), reverse=True)
    days = [datetime.date.fromisoformat(day) for _, day in released()]
    assert days == sorted(days, reverse=True)
    assert ".".join(map(str, versions[0])) == nk.__version__


def test_the_citation_is_of_this_release():
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["version"] == nk.__version__
    assert str(CITATION["date-released"]) == released()[0][1]
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["authors"] == PROJECT["authors"]
    assert CITATION["keywords"] == PROJECT["keywords"]


def test_the_citation_names_the_papers_of_the_readme():
    section = (ROOT / "README.md").read_text().partition("\n## Papers\n")[2]
    papers = re.findall(r"^- (.*?)\. \*(.*)\.\*$", section, flags=re.MULTILINE)
    assert papers
    cited = [
        (
            ", ".join(f"{a['given-names']} {a['family-names']}" for a in paper["authors"]),
            paper["title"],
        )
        for paper in CITATION["references"]
    ]
    assert cited == papers


@pytest.mark.parametrize("path", [f for f in FORMS if f.stem != "config"], ids=lambda p: p.stem)
def test_an_issue_form_has_what_github_asks_for(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert ids
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
