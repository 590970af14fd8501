"""The single writer of models, versions, aliases, endpoints and deployments."""
