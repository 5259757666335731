"""Make the project's own environment, once, and run the demo, the page or the tests in it.

    python tools/start.py demo [arguments of `python -m lib_lora_train demo`]
    python tools/start.py ui [arguments of `python -m lib_lora_train ui`]
    python tools/start.py test [arguments of pytest]

Needs Python 3.10 to 3.13 and nothing else, on Linux, macOS and Windows; for the tests 3.10 or 3.11. Run with another Python
it looks for one of these and goes on with it. The environment is `.venv` in the repository's root; it is made anew when what
it was made from has changed or when it no longer works, and it can be deleted at any time. It is not for the WebUI, which
has its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
ENVIRONMENT = ROOT / ".venv"
STAMP = ENVIRONMENT / "made-by-start.json"
LOG = ENVIRONMENT / "install.log"
# What is installed, and the versions of all that it asks for: those of WebUI v1.10.1, whose torch 2.1.2 has packages for two
# Pythons only, and those of Forge Neo for the Pythons behind them.
REQUIRED = ("requirements.txt", "constraints.txt")
NEWER = ("requirements-newer.txt", "constraints-newer.txt")
PYTHONS = {"3.10": REQUIRED, "3.11": REQUIRED, "3.12": NEWER, "3.13": NEWER}
TEST_REQUIRED = ("requirements-test.txt", "requirements-test-alone.txt")

# Prints "3.10" where that Python can make the environment, and fails or prints something else where not.
PROBE = "import sys, venv, ensurepip, ssl; print('%d.%d' % sys.version_info[:2] if sys.maxsize > 2**32 else '32')"
# Fails where a package was deleted from under us; much quicker than importing them.
WHOLE = "import importlib.util as u; assert all(map(u.find_spec, ('torch', 'transformers', 'gradio', 'safetensors')))"


class CannotStart(Exception):
    """One sentence for the user."""


def main(arguments: list[str]) -> int:
    """Run a command; returns its exit code, 2 if it cannot be started."""
    if not arguments or arguments[0] not in ("demo", "ui", "test"):
        print(__doc__)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    command, rest = arguments[0], arguments[1:]
    try:
        python = environment(for_tests=command == "test")
    except CannotStart as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the next start begins the environment anew.", file=sys.stderr)
        return 130
    module = ["pytest", *on_all_cores()] if command == "test" else ["lib_lora_train", command]
    say({"test": "Running the tests", "demo": "Starting the demo", "ui": "Starting the page"}[command])
    process = subprocess.Popen([str(python), "-m", *module, *rest], cwd=ROOT, env=variables(offline=command == "test"))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:       # the program got it too, and ends in its own way
            continue


def on_all_cores() -> list[str]:
    """pytest's arguments: a file of tests on each core, and one more, since many tests wait for a browser or another process.
    None of them may hang. What the user adds has the last word."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A real WebUI is started once for all tests, but once in each process.
    processes = 0 if os.environ.get("WEBUI_ROOT") else min(cores + 1, 5)
    return ["-n", str(processes), "--dist", "loadfile", "--no-loadscope-reorder", "--timeout", "600"]


def environment(*, for_tests: bool) -> Path:
    """The Python of a complete environment, which is made first where it is missing."""
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pythons = [version for version, files in PYTHONS.items() if files == REQUIRED or not for_tests]
    tests = fingerprint(TEST_REQUIRED) if for_tests else ""
    made = read_stamp()
    if made.get("base") in {fingerprint(PYTHONS[version]) for version in pythons} and works(python):
        if not for_tests or made.get("tests") == tests:
            return python
    else:
        command, version = interpreter(pythons)
        files = PYTHONS[version]
        make(python, command)
        say(f"Installing the versions of {' and '.join(files)} (once; up to 3 GB, some minutes)")
        install(python, "-r", files[0], constraints=files[1])
        made = {"base": fingerprint(files)}
    if for_tests:
        say("Installing what the tests need")
        install(python, "-r", "requirements-test.txt")
        install(python, "--no-deps", "-r", "requirements-test-alone.txt")
    write_stamp({"base": made["base"], "tests": tests or made.get("tests", "")})
    return python


def interpreter(pythons: list[str]) -> tuple[list[str], str]:
    """The command and version of a Python that can make the environment: this one if it is one of `pythons`, else one that is
    found."""
    own = getattr(sys, "_base_executable", "") or sys.executable        # not an environment's, which may be going away
    if (version := probe([own])) in pythons:
        return [own], version
    for version in pythons:
        for candidate in ([f"python{version}"], ["py", f"-{version}"] if os.name == "nt" else []):
            if candidate and shutil.which(candidate[0]) and probe(candidate) == version:
                say(f"This is Python {sys.version.split()[0]}; going on with {' '.join(candidate)}")
                return candidate, version
    needed = f"Python {', '.join(pythons[:-1])} or {pythons[-1]} (64 bit) is needed"
    version = ".".join(map(str, sys.version_info[:2]))
    if version in pythons and sys.maxsize > 2**32:
        raise CannotStart(f"{needed} with its modules venv and ensurepip, which {own} lacks; install them "
                          f"(on Debian and Ubuntu: the package python{version}-venv).")
    raise CannotStart(f"{needed}: this is {sys.version.split()[0]} and no other was found; install one of them from "
                      "https://www.python.org/downloads/ and run this again with it.")


def probe(command: list[str]) -> str:
    """The version of a Python that has all it needs ("3.10"); something else where it has not or does not run."""
    try:
        done = subprocess.run([*command, "-c", PROBE], capture_output=True, text=True, timeout=60, env=variables())
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def make(python: Path, command: list[str]) -> None:
    """An empty environment in the place of what is there, if that is ours to delete."""
    if ENVIRONMENT.exists():
        if not STAMP.exists():
            raise CannotStart(f"{ENVIRONMENT} was not made by this program; move it away or delete it.")
        say("Removing the environment, which is out of date or broken")
        try:
            shutil.rmtree(ENVIRONMENT)
        except OSError as error:
            raise CannotStart(f"{ENVIRONMENT} cannot be removed ({error.strerror}); close the programs that run from "
                              "it and delete it.") from error
    ENVIRONMENT.mkdir()
    write_stamp({})                     # ours from the first moment on, and incomplete until the last
    say(f"Making the environment {ENVIRONMENT}")
    run([*command, "-m", "venv", str(ENVIRONMENT)])
    if not works(python, check="import pip"):
        raise CannotStart(f"{' '.join(command)} did not make a working environment; see {LOG}.")


def install(python: Path, *arguments: str, constraints: str = "constraints.txt") -> None:
    """pip install, quietly, within the constraints."""
    run([str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check",
         "--constraint", constraints, *arguments])


def run(command: list[str]) -> None:
    """Run a step of the installation with its output going to the log; CannotStart with its last lines if it fails."""
    with LOG.open("a", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=TOOLS, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables())
    if done.returncode:
        last = LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise CannotStart("\n".join([*last, f"The environment could not be made: see above, or all of it in {LOG}; "
                                     "check the connection and the space on the disk (8 GB), then run this again."]))


def works(python: Path, *, check: str = WHOLE) -> bool:
    """Whether the environment's Python runs and passes the check."""
    try:
        return subprocess.run([str(python), "-c", check], capture_output=True, env=variables()).returncode == 0
    except OSError:
        return False


def variables(*, offline: bool = True) -> dict[str, str]:
    """The environment variables of whatever is run: no packages from elsewhere, no statistics, and no look at a hub unless the
    user may ask for one."""
    ours = {"PYTHONNOUSERSITE": "1", "GRADIO_ANALYTICS_ENABLED": "False", **({"HF_HUB_OFFLINE": "1"} if offline else {})}
    foreign = ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")
    return {**{name: value for name, value in os.environ.items() if name not in foreign}, **ours}


def fingerprint(names: tuple[str, ...]) -> str:
    """Of the files that say what is installed; line ends do not count, for git may change them."""
    text = "\n".join((TOOLS / name).read_text(encoding="utf-8") for name in names)
    return hashlib.sha256(text.encode()).hexdigest()


def read_stamp() -> dict[str, str]:
    """What the environment was made from; {} where it is missing or was never finished."""
    try:
        return dict(json.loads(STAMP.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def write_stamp(made: dict[str, str]) -> None:
    """Note what the environment was made from."""
    STAMP.write_text(json.dumps(made), encoding="utf-8")


def say(what: str) -> None:
    """One line for each stage."""
    print(f"[{time.strftime('%H:%M:%S')}] {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
