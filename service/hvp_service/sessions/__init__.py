"""Sessions: leases of clients, whose vectors go when they do."""
