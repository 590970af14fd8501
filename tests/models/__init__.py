"""Models that people have, each asked through every protocol and compared with its local ``predict``."""
