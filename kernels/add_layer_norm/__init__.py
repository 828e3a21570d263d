"""A residual sum and its layer normalisation over the last dimension."""
