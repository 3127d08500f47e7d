"""What the server does: the Flower ServerApp, cohort sampling, server optimisers, when to erase."""
