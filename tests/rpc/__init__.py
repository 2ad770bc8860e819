import csi  # noqa: F401 - sets GRPC_ENABLE_FORK_SUPPORT before a test module imports grpc
