"""Inner products and means of the guidance branches: what guidance variants need to know of the network output."""
