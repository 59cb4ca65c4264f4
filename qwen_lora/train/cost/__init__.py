"""What a training step costs: bytes on the device and floating-point operations, from the
architecture alone, and the choice of what the backward pass computes anew."""
