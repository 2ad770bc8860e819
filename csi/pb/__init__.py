"""CSI's messages and service stubs, generated from proto/csi.proto. README.md says how."""
