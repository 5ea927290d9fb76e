"""Tandem: large language models served with prefill and decode on separate workers."""

import os

# gRPC's fork handlers run in every child between fork and exec, and abort a good part of the children of a process
# with calls under way (tests/integration/supervision/test_fork_beside_grpc.py). No child of ours uses gRPC without an
# exec. gRPC reads this when it is first used, so it stands where every process of ours comes by first.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # noqa: TID251
