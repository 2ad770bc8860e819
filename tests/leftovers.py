"""What a test must not leave on this machine."""

from pathlib import Path


def mounts_below(folder: Path) -> list[str]:
    """Mount points below a folder."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(f"{folder}/")]


def loops_below(folder: Path) -> list[str]:
    """Loop devices whose backing file lies (or lay) below a folder."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if backing.read_text().startswith(f"{folder}/"):
                found.append(backing.parent.parent.name)
        except FileNotFoundError:
            continue  # detached in this moment
    return found


def all_below(folder: Path) -> list[str]:
    """Everything of the above."""
    return mounts_below(folder) + loops_below(folder)
