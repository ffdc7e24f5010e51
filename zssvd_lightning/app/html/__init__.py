"""Page that shows what a compression did: one HTML file without links to anything outside."""
