"""Parts of the scheduler: fair turns, waiting rows, row caps and the work to do. No torch."""
