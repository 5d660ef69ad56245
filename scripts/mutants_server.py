"""Runs pytest in forked processes for `mutants.py`. The server imports the libraries once, because their import takes longer than most tests.

    mutants_server.py serve SOCKET MODULE...        import the libraries, then answer requests
    mutants_server.py run SOCKET TESTS [TESTS...]   run groups of tests in the working directory until one group fails

`run` does not import pytest, so that it starts in milliseconds. If cosmic-ray kills `run` after a timeout, the server kills the tests that `run` requested.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
from pathlib import Path


def run(address: str, test_groups: list[str]) -> int:
    """Ask the server to run groups of tests in the working directory. Returns 0 if all tests pass, else 1."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        connection.sendall(json.dumps({"folder": str(Path.cwd()), "groups": test_groups}).encode() + b"\n")
        response = connection.recv(16)
    return int(response or b"1")


def serve(address: str, module_names: list[str]) -> None:
    """Answer requests until the process is killed. Each request is handled in a separate process."""
    for module in ("pytest", *module_names):
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                with contextlib.suppress(OSError):
                    handle_request(connection)
                os._exit(0)
            connection.close()


def handle_request(connection: socket.socket) -> None:
    """Run the tests of one request in a child process, and send its exit code. Kill the child if the client disconnects."""
    request = json.loads(connection.makefile().readline())
    child_pid = os.fork()
    if child_pid == 0:
        os._exit(run_tests(request["folder"], request["groups"]))
    watcher_pid = os.fork()
    if watcher_pid == 0:
        connection.recv(1)  # blocks until the client disconnects
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child_pid, signal.SIGKILL)
        os._exit(0)
    _, wait_status = os.waitpid(child_pid, 0)
    os.kill(watcher_pid, signal.SIGKILL)
    connection.sendall(str(int(wait_status != 0)).encode())


def run_tests(folder: str, test_groups: list[str]) -> int:
    """Run the groups of tests in `folder` in order until one fails. Returns 0 if all pass, else 1."""
    os.setsid()
    os.chdir(folder)
    devnull_fd = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(devnull_fd, stream)
    sys.dont_write_bytecode = True  # Python could otherwise run the cached bytecode of an earlier mutant whose file has the same size and time.
    import pytest

    for group in test_groups:
        child_pid = os.fork()
        if child_pid == 0:
            os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *group.split()])))
        _, wait_status = os.waitpid(child_pid, 0)
        if wait_status:
            return 1
    return 0


if __name__ == "__main__":
    command, socket_path, *arguments = sys.argv[1:]
    if command == "serve":
        serve(socket_path, arguments)
    else:
        sys.exit(run(socket_path, arguments))
