"""A server and its engine on one machine: started, supervised, stopped."""
