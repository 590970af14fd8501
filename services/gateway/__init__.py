"""The HTTP front door: predict, management API, access control."""
