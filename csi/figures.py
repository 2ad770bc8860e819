"""Sizes for people."""


def human(size_bytes: int) -> str:
    """A size in its largest unit: "10 GiB", "1.5 MiB", "512 B"."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def figure(size_bytes: int) -> str:
    """A size for people, and exact: "1.5 GiB (1610612736 bytes)"."""
    return f"{size_bytes} bytes" if abs(size_bytes) < 1024 else f"{human(size_bytes)} ({size_bytes} bytes)"
