"""Inference as the platform sees it: the V1 and V2 forms, the client of a runner and its supervisor."""
