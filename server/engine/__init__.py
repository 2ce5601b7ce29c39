"""The engines as the gateway sees them: over HTTP, watched, chosen, their answers relayed."""
