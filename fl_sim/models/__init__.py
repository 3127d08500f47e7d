"""The networks, each a small spec that builds its body and names its attention taps."""
