"""Events on the log: envelopes, producers, consumers, and the rules of handling that all services share."""
