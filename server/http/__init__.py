"""HTTP: sockets, connections, and what surrounds every request. Knows no route."""
