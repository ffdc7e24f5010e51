"""Everything that Lightning calls: the two callbacks and their parts."""
