"""Filesystems on attached devices: signatures, mkfs, fsck, mounts, growth, usage."""
