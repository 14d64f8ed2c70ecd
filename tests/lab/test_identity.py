"""What counts as the same data, the same network and the same training, and what does not."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from normkit.errors import DataError, NormError, SpecError
from normkit.lab import Recipe, compare
from normkit.lab.data import open_data
from normkit.lab.data.folder import read_folder
from normkit.lab.data.given import read_given
from normkit.lab.data.opening import forget_data
from normkit.lab.data.views import at_size
from normkit.lab.records import TrainingRecord, read_records, sources_of
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.train import run
from normkit.lab.user_code import load_function, name_of, source_hash
from normkit.lab.work import Upkeep
from pictures import fill

ONE = {"norms": "bn", "batch_sizes": 8, "seeds": 1, "recipe": Recipe(epochs=1), "limit": 40}


def num_records(folder):
    return len(read_records(folder, TrainingRecord).records)


def test_a_limit_keeps_all_classes_of_parts_that_are_there(tmp_path):
    for part in ("train", "val", "test"):
        fill(tmp_path / part, classes=("a", "b", "c"), per_class=12)
    data = read_folder(tmp_path, limit=12)
    assert data.train.targets.bincount().tolist() == [4, 4, 4]
    assert data.validation.targets.bincount().tolist() == [4, 4, 4]


class Random(torch.utils.data.Dataset):
    """Pictures that torch, Python and NumPy change each time, as transforms do."""

    def __init__(self, first=0):
        self.first = first

    def __len__(self):
        return 40

    def __getitem__(self, at):
        drawn = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        return torch.full((1, 8, 8), self.first + at + drawn), at % 2


def test_data_that_change_at_random_are_the_same_each_time():
    found = [read_given(Random(), "mine") for _ in range(2)]
    assert found[0].fingerprint == found[1].fingerprint
    assert read_given(Random(1), "mine").fingerprint != found[0].fingerprint


def test_every_value_of_tensors_counts():
    values, targets = torch.zeros(40, 1, 4, 4), torch.arange(40) % 2
    first = read_given(torch.utils.data.TensorDataset(values, targets), "mine").fingerprint
    values = values.clone()
    values[33, 0, 2, 2] = 1
    again = read_given(torch.utils.data.TensorDataset(values, targets), "mine").fingerprint
    assert first != again


def factory(width):
    def make(num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width),
                             nn.Linear(width, num_classes))  # fmt: skip

    return make


def test_functions_that_differ_in_what_is_around_them_are_different(tmp_path):
    sizes = [compare(factory(w), **ONE, out=tmp_path).records[0].outcome for w in (8, 64)]
    assert sizes[0].num_parameters < sizes[1].num_parameters
    assert num_records(tmp_path) == 2
    compare(factory(8), **ONE, out=tmp_path)
    assert num_records(tmp_path) == 2


def test_a_file_that_is_edited_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "my.py"
    for value in (1, 2):
        path.write_text(
            f"from beside_it import number\n\ndef make():\n    return {value} * number\n"
        )
        (tmp_path / "beside_it.py").write_text(f"number = {value + 1}\n")
        assert load_function(f"{path}:make", "--model")() == value * (value + 1)
    assert not sys.dont_write_bytecode
    assert not (tmp_path / "__pycache__").exists()


def test_helpers_of_one_name_in_two_folders_are_two(tmp_path):
    for name, value in (("a", 8), ("b", 64)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "helper_of_test.py").write_text(f"WIDTH = {value}\n")
        (folder / "my.py").write_text(
            "from helper_of_test import WIDTH\n\ndef make():\n    return WIDTH\n"
        )
    found = [load_function(f"{tmp_path}/{name}/my.py:make", "--model")() for name in "aba"]
    assert found == [8, 64, 8]
    assert sys.path[0] != str(tmp_path / "b")  # what else is imported is not looked up there first


def test_files_that_packages_import_count_as_well(tmp_path):
    package = tmp_path / "net_of_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text("WIDTH = 8\n")
    (package / "model.py").write_text("from .layers import WIDTH\nfrom . import layers\n")
    path = tmp_path / "my.py"
    path.write_text("from net_of_test.model import WIDTH\n\ndef make():\n    return WIDTH\n")
    found = [source_hash(f"{path}:make")]
    for name in ("layers.py", "__init__.py", "model.py"):
        with (package / name).open("a") as file:
            file.write("# edited\n")
        found.append(source_hash(f"{path}:make"))
    assert len(set(found)) == 4


def test_the_weights_that_runs_start_from_count(tmp_path):
    path = tmp_path / "w.safetensors"
    found = []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        found.append(sources_of(Protocol(weights=str(path)), None).key)
    assert found[0] != found[1]


def test_paths_are_the_same_however_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = Protocol(model="my.py:make", data="folder:photos", weights="w.safetensors")
    long = Protocol(
        model=f"{tmp_path}/my.py:make", data=f"folder:{tmp_path}/photos",
        weights=f"{tmp_path}/w.safetensors",
    )  # fmt: skip
    assert short == long
    assert short.title == "my.py:make on photos"


def test_folders_of_parts_may_have_capitals(tmp_path):
    fill(tmp_path / "Train", per_class=10)
    fill(tmp_path / "Testing", per_class=3)
    data = read_folder(tmp_path)
    assert (data.num_classes, len(data.test)) == (2, 6)


def test_pictures_of_16_bits_keep_their_shades(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for at in range(10):
            shades = np.full((4, 4), 257 * (20 * at + 3), dtype=np.uint16)
            Image.fromarray(shades).save(tmp_path / name / f"{at}.png")
    data = read_folder(tmp_path)
    found = {int(v) for p in (data.train, data.validation, data.test) for v in p.values.unique()}
    assert found == {20 * at + 3 for at in range(10)}


class Relabelled(torch.utils.data.Dataset):
    """Whose written classes are not those that it gives."""

    targets = tuple(at % 4 for at in range(40))

    def __len__(self):
        return 40

    def __getitem__(self, at):
        return torch.zeros(1, 4, 4), self.targets[at] // 2


def test_the_classes_that_are_given_count_not_those_that_are_written():
    assert read_given(Relabelled(), "mine").num_classes == 2


def test_a_class_without_pictures_is_named(tmp_path):
    fill(tmp_path)
    (tmp_path / "zebra").mkdir()
    with pytest.raises(DataError, match="has no pictures in zebra; take the folder away"):
        read_folder(tmp_path)


def test_a_wide_picture_is_cut_at_its_edges_alone():
    picture = torch.arange(61, dtype=torch.uint8).expand(1, 20, 61).contiguous()
    seen = at_size(picture, (20, 60))
    assert seen.shape == (1, 20, 60)
    assert int(seen.min()) < 6
    assert int(seen.max()) > 54


def test_a_network_that_was_trained_before_is_refused(tmp_path):
    net = factory(8)(10)
    with pytest.raises(SpecError, match="gave the same network again"):
        compare(lambda: net, **ONE, out=tmp_path)


def drawn(apply_norm, batch_size, seed, report):
    apply_norm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    return {"accuracy": 90 + random.random() + np.random.rand() + torch.rand(()).item()}  # noqa: NPY002


def test_every_random_state_is_the_seeds_and_the_callers_stay(tmp_path):
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global state is what is meant
    before = (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    options = {"norms": "bn", "batch_sizes": 8, "seeds": (1, 2)}
    results = [compare(train=drawn, **options, out=tmp_path / name) for name in "ab"]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    scores = [[record.score for record in result.records] for result in results]
    assert scores[0] == scores[1]
    assert scores[0][0] != scores[0][1]
    assert not results[0].comparison.is_share  # whatever a user calls it
    assert "90" in str(results[0]) or "91" in str(results[0])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"better": "lower"}, "--better lower was given without --train"),
        ({"train": drawn, "tune_lr": 0.1}, "--tune-lr was given with --train"),
        ({"image_size": 16}, "--image-size was given 16, but digits has a size of its own"),
        ({"model": lambda: factory(8)(7)}, r"gave \(2, 7\) for 2 examples of 10 classes"),
    ],
)
def test_what_would_be_without_effect_is_refused(tmp_path, given, said):
    with pytest.raises(NormError, match=said):
        compare(**(ONE | given), out=tmp_path)


class Stateful(nn.Module):
    """Whose state dict has more than tensors in it."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = factory(8)(num_classes)

    def forward(self, x):
        return self.body(x)

    def get_extra_state(self):
        return {"text": "state"}

    def set_extra_state(self, state):
        pass


def test_a_state_that_no_file_holds_is_no_failure(tmp_path):
    protocol = Protocol(model=name_of(Stateful, "model"), limit=40, epochs=1)
    spec = TrainingSpec(protocol=protocol, norm="bn", batch_size=8)
    outcome = run(spec, upkeep=Upkeep(folder=tmp_path, checkpoint_seconds=0)).outcome
    assert outcome.status == "finished", outcome.message


class Uncopyable(nn.Module):
    """Has a tensor that cannot be copied."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = factory(8)(num_classes)
        self.made = torch.ones(1, requires_grad=True) * 2

    def forward(self, x):
        return self.body(x)


def test_a_network_that_cannot_be_copied_is_said(tmp_path):
    with pytest.raises(SpecError, match=r"copying model .*Uncopyable.* failed: RuntimeError"):
        compare(Uncopyable, **ONE, out=tmp_path)


SCRIPT = """
import torch
from torch import nn
from normkit.lab import compare

def train(apply_norm, batch_size, seed, report):
    net = apply_norm(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)))
    report()
    return 0.5

print(len(compare(train=train, norms=["bn", "ln"], batch_sizes=[4], seeds=[1, 2]).records))
"""


def test_a_script_is_not_run_again_by_what_it_calls(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("4\n", 0), done.stderr


def test_data_are_read_again_for_each_comparison(tmp_path):
    fill(tmp_path / "photos", per_class=20)
    first = open_data(f"folder:{tmp_path}/photos").fingerprint
    (tmp_path / "photos" / "cat" / "0.png").unlink()
    assert open_data(f"folder:{tmp_path}/photos").fingerprint == first  # within one comparison
    forget_data()
    assert open_data(f"folder:{tmp_path}/photos").fingerprint != first
