"""Engines: how the ServerApp's messages reach the ClientApp."""
