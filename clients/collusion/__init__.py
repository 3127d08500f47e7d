"""What attackers do who see all updates of a round before the server does."""
