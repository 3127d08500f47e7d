"""What attackers stamp on images."""
