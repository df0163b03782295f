"""Several processes of a few simulated devices each, which train together."""

import json
import sys

from tests.processes import free_address, side_by_side


def together(tmp_path, configs, *, processes, devices):
    """What each process read of each run: `[process][run] -> {"weight_bytes", "rows", "file_rows"}`; all must end well."""
    told, address = [tmp_path / f"told-{index}.json" for index in range(processes)], free_address()
    command = [sys.executable, "-m", "tests.multihost.process", address, processes]
    codes, said = side_by_side([[*command, index, out, *configs] for index, out in enumerate(told)], devices=devices)
    assert codes == [0] * processes, "\n".join(said)
    return [json.loads(out.read_text()) for out in told]
