"""What malicious clients do with their data and their update."""
