"""Fixtures of the clusters' tests."""

from tests.lab.conftest import lab, say

__all__ = ["lab", "say"]
