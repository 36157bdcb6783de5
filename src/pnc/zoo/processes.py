"""Workers as processes of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pnc.zoo.model_zoo import Zoo
from pnc.zoo.units import Unit, WorkerLost

_MODULE = "pnc.zoo.looker"


class ProcessWorker:
    """A process that looks at sources, with one thread.

    Args:
        question: File of `write_question`.
        zoo: Where the sources are.
    """

    def __init__(self, question: Path, zoo: Zoo) -> None:
        words = [str(question), str(zoo.folder.resolve()), "yes" if zoo.allow_code else "no"]
        # Many processes share the cores: more threads each would only compete.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def look(self, unit: Unit) -> dict[str, Any]:
        """Ask the process for a look."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(unit) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError as error:  # it is gone already
            raise WorkerLost(str(error)) from error
        if not line.endswith("\n"):
            raise WorkerLost(f"exit status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
