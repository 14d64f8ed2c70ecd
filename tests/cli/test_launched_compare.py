"""`normkit compare` started by torchrun: the processes share the runs, the first one speaks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from normkit.errors import DataError
from normkit.lab.launch import Launch, _own_gpu, launched

TINY = ["compare", "--model", "mlp:depth=2:width=8", "--limit", "40", "--epochs", "1"]
SMALL = [*TINY, "--norms", "bn,ln", "--batch-sizes", "10,20", "--seeds", "1,2", "--json"]
START = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
QUIET = os.environ | {"PYTHONWARNINGS": "ignore"}


def start(port, *arguments):
    return subprocess.Popen(
        [*START, str(port), "-m", "normkit.cli", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET,
    )  # fmt: skip


def records_of(folder):
    path = Path(folder) / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_runs_are_shared_and_shown_once(tmp_path, free_port):
    done = start(free_port, *SMALL, "--out", str(tmp_path / "out"))
    output, errors = done.communicate(timeout=200)
    assert done.returncode == 0, errors
    result = json.loads(output)  # one process printed, and nothing else
    assert [cell["num_finished"] for cell in result["cells"]] == [2, 2, 2, 2]
    specs = [json.dumps(record["spec"], sort_keys=True) for record in records_of(tmp_path / "out")]
    assert len(specs) == len(set(specs)) == 8
    assert "4 of 4 runs" in errors  # the display of the first one's share
    assert (tmp_path / "out" / "report.html").exists()


LEAVING = """
import os
from normkit.lab.launch import launched

def threads():
    names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
    return sorted(name.strip() for name in names if "gloo" in name)

with launched() as launch:
    import torch._dynamo
    import torch.distributed.nn.functional  # by whom a group that is there is held for ever
    assert launch.gather(lambda: launch.rank) == [0, 1]
    during = threads()
os.write(1, f"{len(during) > 0} {threads()}\\n".encode())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have names in /proc")
def test_the_threads_of_the_group_end_with_it(tmp_path, free_port):
    """A worker that lives while Python ends aborts the process, one time in twenty."""
    program = tmp_path / "leaving.py"
    program.write_text(LEAVING)
    done = subprocess.run(
        [*START, str(free_port), str(program)],
        capture_output=True, text=True, env=QUIET, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "True []", "True []"]


def test_an_interrupted_process_ends_the_others(tmp_path, free_port):
    """Killed is the second process, while the first waits for it or still works."""
    out = tmp_path / "out"
    long = [*SMALL, "--seeds", ",".join(map(str, range(400))), "--out", str(out)]
    done = start(free_port, *long)
    wait_until(lambda: len(records_of(out)) > 2)
    os.kill(second_process(done.pid), signal.SIGINT)
    _, errors = done.communicate(timeout=60)
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


@pytest.fixture
def free_port():
    import socket  # noqa: PLC0415 - only here

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_without_a_launcher_a_process_is_alone():
    with launched() as launch:
        assert (launch.rank, launch.size, launch.is_first) == (0, 1, True)
        assert launch.first(lambda: 3) == 3
        assert launch.gather(lambda: 4) == [4]
        assert launch.share([1, 2, 3]) == [1, 2, 3]


def test_every_run_falls_to_one_process():
    shares = [Launch(rank, 3).share(range(7)) for rank in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(7))


def test_ones_own_error_stays_and_a_lost_process_is_named(monkeypatch):
    def failing():
        raise RuntimeError("own")

    with pytest.raises(RuntimeError, match=r"^own$"):
        Launch().gather(failing)

    def lost(work):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("normkit.lab.launch.together", lost)
    with pytest.raises(DataError, match=r"process 0 of 2 has lost the others \(Connection closed"):
        Launch(0, 2).gather(lambda: 1)


@pytest.mark.parametrize(
    ("visible", "local", "own"), [("0,1", "1", "1"), ("4,7", "2", "4"), ("", "1", "")]
)
def test_each_process_has_a_gpu_of_its_own_where_there_are_enough(monkeypatch, visible, local, own):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", local)
    with _own_gpu():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
