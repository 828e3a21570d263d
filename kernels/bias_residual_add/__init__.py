"""Sum of a branch, its bias and the residual, with the statistics that the next group norm needs."""
