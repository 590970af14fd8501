"""Servers that the gateway is compared with: one module each, run in an environment of its own."""
