"""Messages of the Open Inference Protocol, generated from the ``.proto`` files beside this one (``make proto``)."""
