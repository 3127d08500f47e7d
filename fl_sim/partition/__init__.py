"""How training samples are spread over clients."""
