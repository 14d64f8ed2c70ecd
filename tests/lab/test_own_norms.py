"""Norms of a user's own as arms: trained, recorded, and read again."""

import pytest

import normkit as nk
from normkit import recipes
from normkit.cli import main
from normkit.core.partition import Partition
from normkit.lab import Recipe, compare
from normkit.lab.records import TrainingRecord, read_records
from normkit.lab.spec import Protocol, TrainingSpec

SOURCE = """
import normkit as nk
from normkit.core.partition import Partition

class PairNorm(nk.GroupNorm):
    @property
    def partition(self):
        return Partition(num_groups=self.num_groups, examples_per_group={pairs})
"""
FAST = {"batch_sizes": [4], "seeds": [1], "recipe": Recipe(epochs=1), "limit": 40}


class PairNorm(nk.GroupNorm):
    """Group normalization over two neighbouring examples."""

    @property
    def partition(self):
        return Partition(num_groups=self.num_groups, examples_per_group=2 if self.training else 1)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(SOURCE.format(pairs="2 if self.training else 1"))
    return path


def losses(folder):
    found = read_records(folder, TrainingRecord).records
    return {r.spec.norm: r.outcome.epochs[0].train_loss for r in found}


def test_python_compares_what_it_registered_in_other_processes_too(tmp_path):
    nk.register_norm("pair", PairNorm)
    norms = ["gn:2", "pair:2", "xbn/pair:2+ws"]
    for workers, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        result = compare("small-resnet:width=4", norms=norms, workers=workers, out=out, **FAST)
        assert [row["norm"] for row in result.rows()] == norms
    found = losses(tmp_path / "one")
    assert len(set(found.values())) == 3
    assert losses(tmp_path / "two") == found
    protocol = result.records[0].spec.protocol
    assert protocol.own_norms == (f"pair={__file__}:PairNorm",)


@pytest.fixture
def normkit(file, monkeypatch, capsys):
    """Runs a command in the folder of the file, in a process that has registered nothing."""
    monkeypatch.chdir(file.parent)

    def run(*words):
        recipes._METHODS.pop("pair", None)
        code = main(list(words))
        return code, " ".join(capsys.readouterr().err.split())

    return run


COMMAND = (
    "compare", "--model", "small-resnet:width=4", "--norms", "gn:2,pair:2", "--own-norms",
    "pair=my.py:PairNorm", "--batch-sizes", "4", "--seeds", "1", "--epochs", "1", "--limit", "40",
    "--workers", "1", "--out", "out",
)  # fmt: skip


def test_the_command_line_takes_a_class_of_a_file_whose_source_decides_the_run(file, normkit):
    out = file.parent / "out"
    assert normkit(*COMMAND)[0] == 0
    assert normkit("compare", "--config", "out/experiment.toml")[0] == 0
    assert len(read_records(out, TrainingRecord).records) == 2
    before = losses(out)
    file.write_text(SOURCE.format(pairs=1))  # what group norm is
    assert normkit(*COMMAND)[0] == 0
    after = losses(out)
    assert after["pair:2"] != before["pair:2"]
    assert after["pair:2"] == after["gn:2"] == before["gn:2"]


def test_records_are_read_where_the_file_is_not():
    protocol = Protocol(own_norms=("pair=/nowhere/my.py:PairNorm",))
    spec = TrainingSpec(protocol=protocol, norm="xbn/pair:2", batch_size=2)
    assert TrainingSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValueError, match="names norm 'pair'"):
        TrainingSpec(norm="pair:2", batch_size=2)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("my.py:PairNorm", "it must be a name, = and a class in a Python file, as in pair=my.py"),
        ("gn=my.py:PairNorm", "'gn' was given as the name of PairNorm, but it means something"),
        ("pair=my.py:Other", "has no such function; it has PairNorm"),
        ("pair=none.py:PairNorm", "there is no file none.py"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(file, normkit, given, match):
    code, said = normkit(*[given if word == "pair=my.py:PairNorm" else word for word in COMMAND])
    assert code == 2
    assert match in said
    assert not (file.parent / "out").exists()


def test_a_name_that_nobody_registered_says_how(normkit):
    code, said = normkit(*[w for w in COMMAND if w not in {"--own-norms", "pair=my.py:PairNorm"}])
    assert code == 2
    assert "--own-norms names norms of your own" in said


def test_other_commands_read_weights_that_were_trained_with_them(file, normkit):
    words = [word.replace("pair:2", "xbn/pair:2+ws") for word in COMMAND]
    assert normkit(*words, "--save-weights")[0] == 0
    (weights,) = (file.parent / "out" / "weights").glob("xbn_pair*")
    read = ("--model", "small-resnet:width=4", "--data", "digits", "--checkpoint", str(weights))
    code, said = normkit("validate", "--batch-size", "4", *read)
    assert code == 2
    assert "names norm 'pair'" in said
    assert "name norms of your own by --own-norms" in said
    named = (*read, "--own-norms", "pair=my.py:PairNorm")
    assert normkit("validate", "--batch-size", "4", *named)[0] == 0
    assert normkit("tune", "--examples", "20", *named)[0] == 0
    assert normkit("diagnose", "--examples", "20", "--out", "found", *named)[0] in (0, 1)
    saved = str(file.parent / "again.safetensors")
    assert normkit("convert", "--to", "pair:4", "--save", saved, *named)[0] == 0
    again = ("--checkpoint", saved, "--own-norms", "pair=my.py:PairNorm")
    assert normkit("validate", "--batch-size", "4", *read[:4], *again)[0] == 0
    code, said = normkit("validate", "--batch-size", "4", *read, "--own-norms", "pair")
    assert code == 2
    assert "it must be a name, = and a class in a Python file" in said
