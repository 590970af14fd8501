"""Does a server keep the published inference protocols? ``python -m tests.conformance --url http://… --model NAME``."""
