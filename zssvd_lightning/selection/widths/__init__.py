"""Hidden widths as options of selection: removal of units, beside lower ranks of the matrices that meet in one."""
