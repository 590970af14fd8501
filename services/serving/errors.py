"""What can go wrong between the desired state and Ray Serve.

MillraceError
├── TransientError
│   └── ClusterUnavailableError   Ray or Serve's controller does not answer
└── ReplicaUnhealthyError         a replica cannot bring its runner back; Serve replaces the replica
"""

from libs.errors import MillraceError, TransientError


class ClusterUnavailableError(TransientError):
    """Ray or Serve's controller does not answer."""


class ReplicaUnhealthyError(MillraceError):
    """A replica cannot bring its runner back."""
