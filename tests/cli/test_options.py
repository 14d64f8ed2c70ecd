"""What `--help` says of the options."""

import pytest

from normkit.cli import main
from normkit.cli.app import COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_no_words_about_none(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert "None" not in said
    assert "(default: False)" not in said


def test_an_option_says_what_it_takes_and_means(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    lines = [
        " ".join(line.strip("\u2502 ").split()) for line in capsys.readouterr().out.splitlines()
    ]
    assert "--epochs INT Passes over the training data (default: 4)." in lines
    assert "--better {higher,lower}" in lines
    assert any(line.startswith("--save-weights Write the trained weights") for line in lines)
