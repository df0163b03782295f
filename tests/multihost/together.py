"""Several processes of a few simulated devices each, which train together."""

import json
import os
import socket
import subprocess
import sys

from tests.conftest import ROOT


def together(tmp_path, configs, *, processes, devices):
    """What each process read of each run: `[process][run] -> {"weight_bytes", "rows"}`; all must end well."""
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    told = [tmp_path / f"told-{index}.json" for index in range(processes)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.multihost.process", address, str(processes), str(index), out, *configs],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index, out in enumerate(told)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=540)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)
    return [json.loads(out.read_text()) for out in told]
