"""The side of a worker: `python -m pnc.zoo.looker QUESTION ZOO ALLOW` looks at the sources that it is told to.

It reads units as lines of JSON from standard input and writes looks as lines of JSON to standard output, so that
nothing is pickled and the caller's main module is not run again.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from pnc.foundation.errors import FileFormatError, PNCError, PNCWarning
from pnc.foundation.network_state import undisturbed
from pnc.foundation.tensor_files import read_tensors, write_tensors
from pnc.zoo.model_zoo import Zoo
from pnc.zoo.question import Question, question_from
from pnc.zoo.quick_look import Sources
from pnc.zoo.units import Unit

FORMAT = "pnc-zoo-question"


class Looker:
    """Looks at sources in this process.

    Args:
        zoo: Where the sources are.
        question: What is asked of them.
    """

    def __init__(self, zoo: Zoo, question: Question) -> None:
        self._zoo, self._question = zoo, question
        self._of: dict[int, Sources] = {}

    def look(self, unit: Unit) -> dict[str, Any]:
        """Return the facts of a look, or {"refused": why}: one bad network does not stop a ranking."""
        name, n_images = unit
        if n_images not in self._of:
            self._of = {n_images: Sources(self._zoo, self._question.spread(n_images))}
        try:
            with undisturbed(), warnings.catch_warnings():
                warnings.simplefilter("ignore", PNCWarning)
                return self._of[n_images].look_at(name).facts()
        except PNCError as error:
            return {"refused": str(error)}

    def close(self) -> None:
        """Nothing to stop."""


def write_question(path: Path, question: Question) -> None:
    """Write a question for workers."""
    write_tensors(path, question.tensors(), {"format": FORMAT, "facts": question.facts()})


def read_question(path: Path) -> Question:
    """Read what `write_question` wrote."""
    tensors, facts = read_tensors(path)
    if facts.get("format") != FORMAT:
        raise FileFormatError(f"zoo: {path} is no question of a ranking")
    return question_from(tensors, facts["facts"])


def main(question: str, folder: str, allow_code: str) -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a network's own code prints is no answer
    torch.set_num_threads(1)
    looker = Looker(Zoo(folder, allow_code=allow_code == "yes"), read_question(Path(question)))
    for line in sys.stdin:
        name, n_images = json.loads(line)
        answers.write(json.dumps(looker.look((name, n_images))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
