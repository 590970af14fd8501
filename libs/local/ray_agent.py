"""Stands in for the agent that Ray runs on every node for its dashboard (``ray/dashboard/agent.py``): says that it has no ports, and waits.

A raylet does not run without an agent. Ray's own costs 90 MB and 1.5 s of every start, opens three ports, and without a dashboard logs an
error every second. Standard library only: it is run by its path, with ``-I -S``, with the arguments of the one it stands in for.
"""

import argparse
import os
import sys

_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")


def main() -> None:
    """Write ``-1`` for every port the raylet waits for, then wait until the raylet is gone (end of file)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--session-dir", required=True)
    parser.add_argument("--node-id", required=True)
    given, _ = parser.parse_known_args()
    for name in _PORTS:
        path = os.path.join(given.session_dir, f"{name}_{given.node_id}")
        with open(f"{path}.partial", "w") as file:
            file.write("-1")
        os.replace(f"{path}.partial", path)
    while sys.stdin.readline():
        pass


if __name__ == "__main__":
    main()
