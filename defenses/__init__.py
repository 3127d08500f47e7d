"""What the server does against backdoors: robust aggregation and erasing."""
