"""Layer normalisation over the last dimension."""
