"""Lightning callbacks for compression and prehab, and their parts."""
