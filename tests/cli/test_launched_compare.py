"""`normkit compare` started by torchrun: all processes train each network, the first one prints."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from normkit.cli.app import run
from normkit.errors import DataError, SpecError
from normkit.lab.launch import Launch, is_spoken_for, launched, own_device, require_processes
from normkit.lab.records import Epoch

TINY = ["compare", "--model", "mlp:depth=2:width=8", "--limit", "40", "--epochs", "1"]
SMALL = [*TINY, "--norms", "bn,ln", "--batch-sizes", "4,8", "--seeds", "1,2", "--json"]
START = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
QUIET = os.environ | {"PYTHONWARNINGS": "ignore"}
CPU = torch.device("cpu")

# 80 training examples of digits, 8 or 9 of each class: 64 to train on, which both cut alike.
NETWORK = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )
"""
RECIPE = ["--steps", "8", "--limit", "80", "--seeds", "1", "--clip", "2", "--accumulate", "2"]
RECIPE += ["--norm-weight-decay", "0", "--save-weights"]
RESNET = ["compare", "--model", "small-resnet", "--norms", "bn,bgn:2,gn:8", *RECIPE]
ONE = ["--batch-sizes", "8"]
BOTH = ["--batch-sizes", "4", "--synchronize-statistics"]  # a norm sees 4 on each
COMMANDS = """
import sys
from normkit.cli.app import run

sys.exit(max([run(arguments) for arguments in {commands}]))
"""


def start(port, *arguments):
    return subprocess.Popen(
        [*START, str(port), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET,
    )  # fmt: skip


def finished(process, timeout_s=150):
    """What a launcher and its processes wrote, once they have ended."""
    try:
        return process.communicate(timeout=timeout_s)
    finally:
        process.terminate()  # torchrun then ends its processes


def compare(port, *arguments):
    return start(port, "-m", "normkit.cli", *arguments)


def records_of(folder):
    path = Path(folder) / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def trained(tmp_path_factory, free_port):
    """Folders of one training each: by one process, and by two in several ways."""
    folder = tmp_path_factory.mktemp("trained")
    network = folder / "network.py"
    network.write_text(NETWORK)
    own = ["compare", "--model", f"{network}:make", "--norms", "bn,gn:4", *RECIPE]
    commands = {
        "both": [*RESNET, *BOTH],
        "apart": [*RESNET, "--norms", "bn", "--batch-sizes", "4"],
        "sharded": [*own, *BOTH, "--strategy", "fsdp", "--channels-last"],
    }
    given = [[*command, "--out", str(folder / name)] for name, command in commands.items()]
    program = folder / "commands.py"
    program.write_text(COMMANDS.format(commands=given))
    together = start(free_port, str(program))
    try:
        assert run([*RESNET, *ONE, "--out", str(folder / "one")]) == 0
        assert run([*own, *ONE, "--out", str(folder / "own")]) == 0
    finally:
        _, errors = finished(together)
    assert together.returncode == 0, errors
    return folder


def ends_of(folder):
    """By norm: the epochs' figures and the trained weights."""
    found = {}
    for record in records_of(folder):
        assert record["outcome"]["status"] == "finished", record["outcome"]["message"]
        norm = record["spec"]["norm"]
        (weights,) = folder.glob(f"weights/{norm.replace(':', '_')}-*.safetensors")
        epochs = [Epoch(**epoch) for epoch in record["outcome"]["epochs"]]
        figures = [value for epoch in epochs for value in epoch.figures().values()]
        found[norm] = torch.tensor(figures, dtype=torch.float64), load_file(weights)
    return found


@pytest.mark.parametrize(("one", "both"), [("one", "both"), ("own", "sharded")])
def test_two_processes_train_as_one_does_on_the_whole_batch(trained, one, both):
    """With synchronised statistics; FSDP2 keeps a part of each weight on each process."""
    expected, found = ends_of(trained / one), ends_of(trained / both)
    assert found.keys() == expected.keys()
    for norm in expected:
        torch.testing.assert_close(found[norm], expected[norm], atol=1e-5, rtol=1e-5)


def test_statistics_of_each_process_alone_train_another_network(trained):
    """Check that the test above can fail."""
    epochs, weights = ends_of(trained / "apart")["bn"]
    expected, same_weights = ends_of(trained / "both")["bn"]
    assert (epochs - expected).abs().max() > 1e-3
    assert (weights["0.weight"] - same_weights["0.weight"]).abs().max() > 1e-3


def test_records_say_how_many_processes_trained(trained):
    one, both = (records_of(trained / name)[0]["spec"] for name in ("one", "both"))
    assert (one["batch_size"], both["batch_size"]) == (8, 4)
    differences = {k: v for k, v in both["protocol"].items() if v != one["protocol"][k]}
    assert differences == {"processes": 2, "synchronize_statistics": True}


def test_the_first_process_alone_prints_and_writes(tmp_path, free_port):
    done = compare(free_port, *SMALL, "--out", str(tmp_path / "out"))
    output, errors = finished(done)
    assert done.returncode == 0, errors
    result = json.loads(output)  # one process printed, and nothing else
    assert [cell["num_finished"] for cell in result["cells"]] == [2, 2, 2, 2]
    specs = [json.dumps(record["spec"], sort_keys=True) for record in records_of(tmp_path / "out")]
    assert len(specs) == len(set(specs)) == 8
    assert "8 of 8 runs" in errors  # one display
    assert (tmp_path / "out" / "report.html").exists()


RESUMED = """
import shutil, sys
from dataclasses import replace
from pathlib import Path
from torch import distributed
from normkit.lab.launch import launched
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.train import run
from normkit.lab.work import Upkeep

class Killed(BaseException):
    pass

def killed_after(num_steps):
    count = 0
    def on_step():
        nonlocal count
        count += 1
        if count == num_steps:
            raise Killed
    return on_step

def main(folder, strategy, **recipe):
    protocol = Protocol(
        model="small-resnet:width=4:blocks=1", limit=80, epochs=2, processes=2, accumulate=2,
        strategy=strategy, **recipe,
    )
    spec = TrainingSpec(protocol=protocol, norm="bn", batch_size=4, seed=1)
    expected = run(spec).outcome
    assert expected.status == "finished" and expected.num_steps == 10, expected
    upkeep = Upkeep(folder=folder, checkpoint_seconds=0)
    for moment, left in ((4, {3}), (5, {3, 7})):
        try:
            run(spec, killed_after(moment), upkeep)
        except Killed:
            pass
        rank = distributed.get_rank()
        files = {int(p.stem.split("-")[-1]): p for p in folder.glob(f"checkpoints/*-{rank}-*")}
        assert set(files) <= left and max(files) == max(left), files
        aside = folder / f"aside-{rank}"
        if rank == 1 and aside.exists():  # as if only this process had written once more
            shutil.copy(aside, str(files[7]).replace("-7.", "-9."))
        shutil.copy(files[max(files)], aside)
    assert run(spec, upkeep=upkeep).outcome == expected
    distributed.barrier()
    assert not list(folder.glob("checkpoints/*")), list(folder.glob("checkpoints/*"))

with launched():
    main(Path(sys.argv[1]) / "ddp", "ddp", mixup=0.2)
    main(Path(sys.argv[1]) / "fsdp", "fsdp", optimizer="adamw", base_lr=1e-3)
print("resumed")
"""


def test_a_killed_training_of_two_processes_goes_on_bit_for_bit(tmp_path, free_port):
    program = tmp_path / "resumed.py"
    program.write_text(RESUMED)
    done = start(free_port, str(program), str(tmp_path))
    output, errors = finished(done)
    assert (done.returncode, output.count("resumed")) == (0, 2), errors


LEAVING = """
import os
from normkit.lab.launch import launched

def threads():
    names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
    return sorted(name.strip() for name in names if "gloo" in name)

with launched() as launch:
    import torch._dynamo
    import torch.distributed.nn.functional  # by whom a group that is there is held for ever
    assert launch.first(lambda: launch.rank) == 0
    during = threads()
os.write(1, f"{len(during) > 0} {threads()}\\n".encode())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have names in /proc")
def test_the_threads_of_the_group_end_with_it(tmp_path, free_port):
    """A worker that lives while Python ends aborts the process, one time in twenty."""
    program = tmp_path / "leaving.py"
    program.write_text(LEAVING)
    done = start(free_port, str(program))
    output, errors = finished(done)
    assert done.returncode == 0, errors
    assert sorted(output.split("\n")) == ["", "True []", "True []"]


def test_an_interrupted_process_ends_the_others(tmp_path, free_port):
    """The second process is killed while the first waits for it or still works."""
    out = tmp_path / "out"
    long = [*SMALL, "--seeds", ",".join(map(str, range(400))), "--out", str(out)]
    done = compare(free_port, *long)
    wait_until(lambda: len(records_of(out)) > 2)
    os.kill(second_process(done.pid), signal.SIGINT)
    _, errors = finished(done)
    assert done.returncode != 0
    assert "interrupted; finished runs are kept" in errors
    assert len(records_of(out)) < 1600
    assert not (out / "report.html").exists()


def second_process(parent):
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    ranks = {int(c): Path(f"/proc/{c}/environ").read_bytes().split(b"\0") for c in children}
    return next(child for child, variables in ranks.items() if b"RANK=1" in variables)


def wait_until(is_so, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


FAILING = """
import os
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm2d(1), nn.Linear(64, 10)

    def forward(self, x):
        if self.training and torch.is_grad_enabled() and os.environ["RANK"] == "1":
            raise RuntimeError("out of luck")
        return self.out(self.norm(x).flatten(1))
"""


def test_what_goes_wrong_on_one_process_is_said_in_a_sentence(tmp_path, free_port):
    """The other processes would wait forever, so the launcher ends all of them."""
    (tmp_path / "net.py").write_text(FAILING)
    model = ["--model", f"{tmp_path}/net.py:Net", "--norms", "bn", "--batch-sizes", "4"]
    done = compare(free_port, *TINY, *model, "--out", str(tmp_path / "out"))
    _, errors = finished(done)
    assert done.returncode != 0
    assert "bn at batch size 4 failed on one of 2 processes: RuntimeError: out of luck" in errors
    assert 'File "' not in errors.split("torch/distributed/elastic")[0]
    assert records_of(tmp_path / "out") == []


@pytest.fixture(scope="module")
def free_port():
    import socket  # only here

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_without_a_launcher_a_process_is_alone():
    with launched() as launch:
        assert (launch.rank, launch.size, launch.is_first) == (0, 1, True)
        assert launch.first(lambda: 3) == 3
    assert not is_spoken_for()


def test_ones_own_error_stays_and_a_lost_process_is_named(monkeypatch):
    def failing():
        raise RuntimeError("own")

    with pytest.raises(RuntimeError, match=r"^own$"):
        Launch().first(failing)

    def lost(work):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("normkit.lab.launch.run_on_all_ranks", lost)
    with pytest.raises(DataError, match=r"process 0 of 2 has lost the others \(Connection closed"):
        Launch(0, 2).first(lambda: 1)


@pytest.fixture
def as_if_launched(monkeypatch):
    """The variables that torchrun gives the second of two processes."""
    given = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    for name, value in {**given, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))


def test_each_process_has_a_gpu_of_its_own(as_if_launched):
    assert own_device(torch.device("cuda:0")) == torch.device("cuda:1")
    assert own_device(CPU) == CPU


def test_without_a_launcher_the_gpu_is_the_one_that_was_asked_for():
    assert own_device(torch.device("cuda:3")) == torch.device("cuda:3")


def test_fewer_gpus_than_processes_are_refused(as_if_launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert is_spoken_for()
    require_processes(2, "fsdp", CPU)
    with pytest.raises(SpecError, match=r"2 processes were started here, and there are 1 GPUs; st"):
        require_processes(2, "auto", torch.device("cuda"))


def test_processes_that_were_not_started_are_refused(as_if_launched, monkeypatch):
    with pytest.raises(SpecError, match=r"processes was given 3, and 2 were started; start it by"):
        require_processes(3, "auto", CPU)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(
        SpecError, match=r"processes was given 3, and 1 was started; start it by to"
    ):
        require_processes(3, "auto", CPU)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_strategy_for_several_processes_needs_them(tmp_path, capsys, strategy):
    out = tmp_path / "out"
    assert run([*TINY, "--strategy", strategy, "--out", str(out)]) == 2
    said = f"--strategy was given {strategy}, which several processes train by, and this is one; st"
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_cluster_and_a_launcher_are_refused_together(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("normkit.lab.experiment.launched", lambda: nullcontext(Launch(0, 2)))
    assert run([*TINY, "--cluster", "ray", "--out", str(tmp_path / "out")]) == 2
    assert "leave out torchrun or --cluster" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "RANK"])
def test_variables_that_are_no_numbers_are_said_in_a_sentence(
    as_if_launched, monkeypatch, tmp_path, capsys, variable
):
    monkeypatch.setenv(variable, "many")
    assert run([*TINY, "--out", str(tmp_path / "out")]) == 2
    assert f"{variable}=many" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
