//! Starts the workers, creates and removes ports, and takes table changes: the seam that the rest of the program sees.
