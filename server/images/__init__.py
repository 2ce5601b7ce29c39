"""Images of a request: fetched, checked, normalised."""
