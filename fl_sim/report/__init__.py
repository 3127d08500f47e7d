"""Many runs at once: what they left is read, grouped, compared and shown."""
