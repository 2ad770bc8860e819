"""Shows that a test fails without the defence that it is for.

    python -m tests.tools.without_defence [NUMBER ...]

For each row of tests/reliability (all of them without a number) and each way to take its defence out, it copies the
project, makes the edits there, and runs the row's tests in the copy, as root. All of them must fail, and in the test
itself: an error of a fixture proves nothing. Exit code 1 if one does not.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.reliability.rows import Edit, Without, read_rows
from tests.scratch_folder import ON_DISK, scratch_folder

PROJECT = Path(__file__).resolve().parents[2]
#: Not copied, but used from the copy too.
_SHARED = (".venv", ".cache")


def main(numbers: list[int]) -> int:
    """Print a line for each test of each way; the exit code."""
    rows = read_rows()
    if unknown := set(numbers) - {row.number for row in rows}:
        print(f"no such rows: {sorted(unknown)}", file=sys.stderr)
        return 2
    passed = 0
    for row in rows:
        if numbers and row.number not in numbers:
            continue
        for way in row.without:
            for test, failed, words in outcomes(way):
                passed += not failed
                print(f"{row.number:>3}  {'fails' if failed else 'DOES NOT FAIL'}  {test}\n     {words}", flush=True)
    print(f"{passed} tests do not fail without their defence" if passed else "every test fails without its defence")
    return int(passed > 0)


def outcomes(way: Without) -> Iterator[tuple[str, bool, str]]:
    """For each test of a way: its name, whether it failed, and the error or the time that it took."""
    with copy_of_project() as copy:
        for edit in way.edits:
            apply(edit, copy)
        for test in way.tests:
            began = time.monotonic()
            failed, words = run(test, copy)
            yield test, failed, f"{words} ({time.monotonic() - began:.0f} s)"


def apply(edit: Edit, folder: Path) -> None:
    """Make the edit below `folder`. Raises ValueError unless its text stands there exactly once."""
    path = folder / edit.file
    text = path.read_text()
    if text.count(edit.find) != 1:
        raise ValueError(f"{edit.file}: this text is there {text.count(edit.find)} times, not once:\n{edit.find}")
    path.write_text(text.replace(edit.find, edit.put))


@contextmanager
def copy_of_project() -> Iterator[Path]:
    """A copy of the working tree, in a place that the lab's guests see."""
    with scratch_folder("without", base=ON_DISK) as folder:
        listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        names = subprocess.run(listing, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, names):
            if (PROJECT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(PROJECT / name, folder / name)
        for name in _SHARED:
            (PROJECT / name).mkdir(exist_ok=True)
            (folder / name).symlink_to(PROJECT / name)
        yield folder


def run(test: str, folder: Path) -> tuple[bool, str]:
    """Whether the test itself failed, and the first line of the error, or pytest's last line."""
    argv = [".venv/bin/python", "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", test]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    errors = [line[1:].strip() for line in lines if line.startswith("E  ")]
    failed = any(line.startswith("FAILED ") for line in lines)
    return failed, (errors or lines[-1:] or ["no output"])[0][:160]


if __name__ == "__main__":
    sys.exit(main([int(number) for number in sys.argv[1:]]))
