"""Learning a rotation: on weights (OptRot), on covariances or tokens, or through the network."""
