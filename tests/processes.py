"""Processes that a test starts side by side, and ends whatever happens."""

import os
import socket
import subprocess

from tests.conftest import ROOT


def free_address():
    """HOST:PORT where nobody listens."""
    with socket.create_server(("localhost", 0)) as free:
        return f"localhost:{free.getsockname()[1]}"


def side_by_side(commands, *, devices=1, timeout=540):
    """(exit codes, what each has said) of commands that run at the same time, each with so many simulated devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    started = [
        subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for command in commands
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said
