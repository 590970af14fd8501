"""What the servers are asked: a model, so many rows a request, a form, and so many connections."""

from dataclasses import dataclass

from benchmarks.peers.peer import Form, Peer


@dataclass(frozen=True)
class Point:
    """One kind of load."""

    name: str
    title: str
    model: str
    rows: int
    form: Form
    connections: int

    def is_for(self, peer: Peer) -> bool:
        """Whether a server can be asked this; one without models is asked for iris only: it answers the same to everything."""
        if self.form not in peer.forms:
            return False
        return self.model in peer.models if peer.models else self.model == "iris"


POINTS = (
    Point("iris-1", "iris 1×4, 1 connection", "iris", 1, Form.JSON, 1),
    Point("iris-32", "iris 1×4, 32 connections", "iris", 1, Form.JSON, 32),
    Point("iris-128", "iris 1×4, 128 connections", "iris", 1, Form.JSON, 128),
    Point("cancer-32", "breast cancer 1×30, 32 connections", "cancer", 1, Form.JSON, 32),
    Point("table-32", "a row of 10 numbers and 10 texts, 32 connections", "table", 1, Form.JSON, 32),
    Point("rows-json", "breast cancer 1000×30 JSON, 8 connections", "cancer", 1_000, Form.JSON, 8),
    Point("rows-binary", "breast cancer 1000×30 binary REST, 8 connections", "cancer", 1_000, Form.BINARY, 8),
    Point("boosted-32", "gradient-boosted trees 1×30, 32 connections", "boosted", 1, Form.JSON, 32),
    Point("split-32", "two versions, half of the traffic each, 1×30, 32 connections", "split", 1, Form.JSON, 32),
    Point("iris-grpc", "iris 1×4 gRPC, 32 connections", "iris", 1, Form.GRPC, 32),
    Point("rows-grpc", "breast cancer 1000×30 gRPC, 8 connections", "cancer", 1_000, Form.GRPC, 8),
)
