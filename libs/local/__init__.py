"""The platform on one machine: what `millrace up` starts, watches and stops."""
