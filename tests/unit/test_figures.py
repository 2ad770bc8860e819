import pytest

from csi.figures import figure, human


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (10 << 40, "10 TiB"), (1 << 62, "4 EiB")],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert human(size_bytes) == text


def test_figures() -> None:
    assert figure(0) == "0 bytes"
    assert figure(1023) == "1023 bytes"
    assert figure(1536 << 20) == "1.5 GiB (1610612736 bytes)"
    assert figure(-(1 << 30)) == "-1 GiB (-1073741824 bytes)"
