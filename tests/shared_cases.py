"""Runs situations that were reported to trainers, each a folder with `run.sh`, its input and `expect.txt`, and looks whether
what `expect.txt` asks for holds.

    python -m tests.shared_cases FOLDER [part of a case's name ...]

`run.sh` prints what check, train, prepare and tag do with the input. Here stands, for each case, what its output must and must
not show. A traceback, a case without an entry and an entry without a case are faults everywhere. Needs bash.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 1800  # seconds for one case; the longest train a dozen small LoRAs


@dataclass(frozen=True)
class Expected:
    """Regular expressions for what a case prints; a dot meets line ends, too."""

    shown: tuple[str, ...] = ()
    not_shown: tuple[str, ...] = ()
    times: tuple[tuple[str, int], ...] = ()  # what is found exactly so many times


OK = Expected(shown=(r"^ok\b",), not_shown=("FAULT",))

EXPECTED: dict[str, Expected] = {}


def faults_of(case: Path) -> list[str]:
    """What does not hold in a case, a sentence each."""
    expected = EXPECTED.get(case.name)
    if expected is None:
        return ["nothing says here what is expected of it"]
    done = subprocess.run(
        ["bash", str(case / "run.sh")], cwd=ROOT, capture_output=True, timeout=PATIENCE,
        env={**os.environ, "APP": str(ROOT), "PY": sys.executable})
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    faults = [f"not shown: {wanted}" for wanted in expected.shown if not _found(wanted, said)]
    faults += [f"shown: {found[0]!r}" for unwanted in (*expected.not_shown, "Traceback") if (found := _found(unwanted, said))]
    faults += [f"{count} times instead of {times}: {wanted}" for wanted, times in expected.times
               if (count := len(_found(wanted, said))) != times]
    return faults


def _found(pattern: str, text: str) -> list[str]:
    return [match.group() for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)]


def main(arguments: Sequence[str]) -> int:
    """Returns 1 where something does not hold, 2 where there is no such folder."""
    if not arguments or not (folder := Path(arguments[0])).is_dir():
        print(__doc__)
        return 2
    cases = {file.parent.name: file.parent for file in sorted(folder.glob("*/*/expect.txt"))}
    wrong = 0
    for name, case in cases.items():
        if len(arguments) > 1 and not any(part in name for part in arguments[1:]):
            continue
        faults = faults_of(case)
        wrong += bool(faults)
        print(f"{name}: {'ok' if not faults else '; '.join(faults)}", flush=True)
    if missing := sorted(EXPECTED.keys() - cases.keys()):
        print(f"not there: {', '.join(missing)}")
    return int(wrong > 0 or bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
