"""How the student learns: one file per method, each readable next to its paper. `registry` knows them by name."""
