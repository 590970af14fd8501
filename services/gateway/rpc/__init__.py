"""gRPC: HTTP/2, calls, and the services spoken over them. Nothing here knows tensors; the door does."""
