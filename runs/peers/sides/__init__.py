"""One file for each peer that has none elsewhere. Each runs by its path, by an interpreter that need not have this package."""
