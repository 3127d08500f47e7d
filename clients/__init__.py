"""What clients do: the Flower ClientApp, honest training, triggers and attacks."""
