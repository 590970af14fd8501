"""The command line: ``millrace``. It speaks HTTP to the gateway and starts and stops the platform on this machine."""
