"""The tests. `csi` comes first: it sets what gRPC has to know before it is imported."""

import csi  # noqa: F401
