"""How honest clients train."""
