//! Pure functions over frames for what network cards do: checksums.
