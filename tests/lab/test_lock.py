"""One process at a time works in a folder."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from normkit.errors import DataError
from normkit.lab.lock import LOCK_NAME, only_user

HOLDING = """
import sys, time
from pathlib import Path
from normkit.lab.lock import only_user

with only_user(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path):
    first = holder(tmp_path)
    host = socket.gethostname()
    said = rf"{tmp_path} is in use by process {first.pid} on {host}, since 20.*; wait until it ends"
    with pytest.raises(DataError, match=said), only_user(tmp_path):
        pytest.fail("both have it")
    first.communicate("")
    with only_user(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on {host}")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_does_not_keep_the_folder(tmp_path):
    first = holder(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (tmp_path / LOCK_NAME).exists()
    with only_user(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_free_after_an_exception(tmp_path):
    with pytest.raises(KeyboardInterrupt), only_user(tmp_path):
        raise KeyboardInterrupt
    with only_user(tmp_path):
        pass


def test_the_lock_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    """Between opening and locking, the process before may end and remove the file."""
    import fcntl  # what is played here

    lock, calls = fcntl.flock, []

    def late(descriptor, how):
        calls.append(0)
        if len(calls) == 1:
            (tmp_path / LOCK_NAME).unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with only_user(tmp_path):
        assert (tmp_path / LOCK_NAME).exists()
    assert len(calls) == 2


def test_a_folder_without_permission_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    denied = pytest.raises(DataError, match=r"\.in-use cannot be read or written \(denied\)")
    with denied, only_user(tmp_path):
        pass
