"""HTML pages that load nothing, and the small charts in them."""
