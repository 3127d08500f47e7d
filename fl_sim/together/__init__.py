"""Training several clients as one network, exactly as each would train alone."""
