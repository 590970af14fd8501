"""The records of the prediction log: how they are written and read, and what they prove."""
