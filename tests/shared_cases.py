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
    """Regular expressions for what a case prints. A dot meets line ends, too; "…" is anything that the same command prints."""

    shown: tuple[str, ...] = ()
    not_shown: tuple[str, ...] = ()
    times: tuple[tuple[str, int], ...] = ()  # what is found exactly so many times


OK = Expected(shown=(r"^ok\b",), not_shown=("FAULT",))
EXPECTED: dict[str, Expected] = {
    # --- datasets
    "04-gigantic-panorama": Expected(
        shown=(r"=== check…pano\.png[^\n]*179 million pixels", r"=== train…pano\.png[^\n]*179 million",
               r"=== prepare…left out pano\.png: [^\n]*179 million", r"ss_dataset_dirs [^\n]*\"img_count\": 3",
               r"large\.png: 12000×6000"),
        times=((r"^rc=0$", 1), (r"^rc=3$", 2))),
    "06-names-with-dots-and-twins": Expected(
        shown=(r"\"bbb\": 1, \"ccc\": 1, \"shared\": 2", r"b\.txt: zzk, shared", r"b_2\.txt: zzk, shared",
               r"aaa\.bbb\.txt: zzk, bbb", r"aaa\.ccc\.txt: zzk, ccc"),
        not_shown=(r"nearest: \S+ 0\.0",), times=((r"^  latent ", 4), (r"^rc=0$", 2))),
    "08-captions-of-several-lines": Expected(
        shown=(r"=== train…several lines[^\n]*hydrus\.txt, kohya\.txt, llm\.txt", r"=== check…several lines…llm\.txt",
               r"=== prepare…several lines[^\n]*llm\.txt", r"red hat\^M\$\noutdoors", r"a zzk with a hat-- ",
               r"It stands on a table"),
        not_shown=(r"solo[^\n]*outdoors\^M",)),
    "09-onetrainer-masklabel": Expected(
        shown=(r"=== check…2 masks \(a-masklabel\.png, b-masklabel\.png\) are not taken as pictures",
               r"=== train…2 masks \(a-masklabel", r"=== prepare…2 pictures added", r"ds/masks:\na\.png\nb\.png",
               r"\"img_count\": 2")),
    # Read and named where these encodings are certain or well guessed, in the place of the refusal that was asked for first.
    "10-captions-in-other-encodings": Expected(
        shown=(r"=== train [^\n]*enc\n…Windows-1252[^\n]*cp1252\.txt.*GBK[^\n]*gbk\.txt.*Shift-JIS[^\n]*sjis\.txt.*"
               r"UTF-16[^\n]*utf16\.txt, utf16cjk\.txt, utf16le\.txt", r"\"café\": 1", r"\"红色帽子\": 1", r"\"猫の女の子\": 1",
               r"\"bom\": \{\"zzk\": 3, \"hat\": 2"),
        not_shown=("\ufffd", "\ufeff", "\0")),
    "11-captions-in-json": Expected(
        shown=(r"\"sidecar\": \{\"zzk\": 2, \"hat\": 2", r"\"kohya\": \{\"zzk a\": 1, \"hat\": 1, \"zzk b\": 1\}",
               r"\"hf\": \{\"zzk\": 2, \"a\": 1"),
        times=((r"^2 pictures, 2 with captions\.", 3), (r"^rc=0$", 9))),
    "15-full-width-commas": Expected(
        shown=(r"\"zzk\": 3, \"1girl\": 3, \"solo\": 3", r"a\.txt <==\nzzk, 1girl, solo, red hat, 红发"),
        not_shown=(r"zzk, zzk",)),
    "18-nested-folders": Expected(
        shown=(r"=== train…3 pictures in the folder outfit", r"=== check…3 pictures in the folder outfit"),
        times=((r"^4 pictures added", 2), (r"^4 pictures, 4 with captions\.", 2))),
    "19-prepare-of-kohya-folders": Expected(
        shown=(r"a\.txt: sks dog", r"c\.txt: sks hat", r"The repeats of 20_sks dog, 5_sks hat are not kept",
               r"\"sks dog\": 2, \"sks hat\": 1", r"left out reg: Its 2 pictures show the class",
               r"left out proj\.zip/proj/reg: Its 2 pictures show the class"),
        times=((r"^1 picture added", 2),)),
    "24-colour-modes": Expected(
        shown=(r"=== train…allclear\.png[^\n]*transparent everywhere", r"=== check…allclear\.png…transparent everywhere",
               r"left out allclear\.png: It is transparent everywhere"),
        # Two of the twelve are held out, and are in no cache.
        times=((r"latent (ref|rgb16|cmyk|grey|grey16|trns_rgb|pal)\.\w+\.\S+ [^\n]* 0\.0\d\d\d$", 7),)),
    "28-accents-of-macos": Expected(
        shown=(r"\"zzk\": 2, \"b\": 1, \"cup\": 1",), times=((r"\"captioned\": true", 2),)),
    "31-captions-written-after-the-import": Expected(
        shown=(r"^2 pictures, 2 with captions\.", r"same file as a \(1\)\.png, which had no caption and got this one's"),
        times=((r"which had no caption and got this one's", 3), (r"^a\.txt$", 1), (r"^b\.txt$", 1))),
    "38-png-damaged-a-little": Expected(
        shown=(r"=== check [^\n]*\n[^\n]*5 pictures", r"^5 pictures added",), not_shown=(r"left out", r"cannot be used"),
        times=((r"\"img_count\": 5", 2),)),
    "39-captions-and-pictures-apart": Expected(
        shown=(r"=== check…2 text files fit no picture \(1\.txt, 2\.txt\)", r"=== train…2 text files fit no picture",
               r"captions/1\.txt, captions/2\.txt", r"which is not read there", r"outfits/night 1", r"\"masked\": true")),
    "42-crop-sheet-of-separators": Expected(
        shown=(r"sheet\.png$", r"thin\.png$"), not_shown=(r"^rc=1$",), times=((r"^rc=[023]$", 2),)),
    # --- trainings
    "02-overwrite": Expected(
        shown=("a: ok", "b: ok", r"second rc 2|^c-2\.safetensors$…^c\.safetensors$"), not_shown=("FAULT",)),
    "03-non-utf8-text": Expected(
        shown=(r"h: path in the last event: \S+ exists",), not_shown=("FAULT", r"hash_ok +(?!True)"),
        times=((r"^[a-g]-[\w-]+ rc [02]: \S", 7),)),
    "04-settings-files": Expected(
        shown=(r"^kohya_ss's own toml\t0\t[^\n]*is (ready|saved)", r"^toml list resolution\t0\t",
               r"^kohya text_encoder_lr list\t0\t"),
        not_shown=(r"^[^\t\n]+\t(?!0\t|2\t|exit 2\t)[^\n]*", r"TRACEBACK")),
    "05-resume-more-epochs": OK,
    "06-step-counts": OK,
    "12-resume-twice": OK,
    "16-fsync-refused": Expected(shown=("ENOTSUP ok", "EINVAL ok", "ENOSYS ok"), not_shown=("FAULT",)),
}


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
    return [match.group() for match in re.finditer(pattern.replace("…", r"(?:(?!^=== ).)*?"), text, re.DOTALL | re.MULTILINE)]


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
