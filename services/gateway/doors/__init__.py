"""The predict doors, one module for each protocol: ``reads()`` are its predict routes, ``handlers()`` those that only tell something."""
