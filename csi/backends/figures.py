"""Sizes in messages: for people, and exact."""

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def figure(size_bytes: int) -> str:
    """A size as `1.5 GiB (1610612736 bytes)`."""
    value, unit = float(size_bytes), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    if unit == 0:
        return f"{size_bytes} bytes"
    return f"{value:.1f} {_UNITS[unit]} ({size_bytes} bytes)"
