"""Several compressions one after another in the same fit."""
